package zestor

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// EventType says what an Event is about.
type EventType string

const (
	EventCreate EventType = "create" // a key is new
	EventUpdate EventType = "update" // a key has a new value
	EventDelete EventType = "delete" // a key is gone
	EventSynced EventType = "synced" // the replay is complete; live changes follow
	EventError  EventType = "error"  // the watch ends here, for the reason in Err
)

// Event is one step of a watch. An event of create, update or delete is a
// change, or in an initial replay an entry. EventSynced and EventError have no
// Key, Value and Version.
type Event[T any] struct {
	Type    EventType
	Kind    string
	Key     string
	Value   T     // delete: the value that was deleted
	Version int64 // delete: the version that was deleted

	// Revision is the number of the change, or that of the entry. In an
	// EventSynced and EventError it is the revision up to which the watch is
	// complete: WithSince with it continues exactly there. An initial replay
	// that ended before its EventSynced says -1: start over, with an empty
	// state.
	Revision int64

	// Err is why the watch ends, or why Value could not be decoded.
	Err error
}

// WatchOption is an option of Watch. A nil one is skipped; of a repeated one
// the last holds.
type WatchOption func(*watchOptions)

// DefaultWatchBufferSize is how many undelivered changes a watch may hold
// unless WithBufferSize says otherwise: a limit, not an allocation.
const DefaultWatchBufferSize = 65536

// WithInitialReplay first sends every current entry, as creates in key order
// with the entry's own version and revision, and then an EventSynced.
func WithInitialReplay() WatchOption { return func(o *watchOptions) { o.initial = true } }

// WithSince first sends every change after a revision, in order, and then an
// EventSynced. A SQLite file keeps the newest changes, across restarts too, see
// SQLiteOptions.HistoryBytes; the memory store keeps none, so there only the
// newest revision will do. One that the history does not reach from, too old
// or beyond the newest, is ErrCompacted; a negative one is another error, and
// so is WithInitialReplay beside it.
func WithSince(revision int64) WatchOption {
	return func(o *watchOptions) { o.resume, o.since = true, revision }
}

// WithPrefix leaves only keys that start with it.
func WithPrefix(prefix string) WatchOption { return func(o *watchOptions) { o.prefix = prefix } }

// WithEventTypes leaves only these of create, update and delete; any other is
// an error. The entries of an initial replay are creates.
func WithEventTypes(types ...EventType) WatchOption {
	types = append([]EventType{}, types...) // not nil, even for none
	return func(o *watchOptions) { o.types = types }
}

// WithBufferSize sets how many undelivered changes the watch may hold, at
// least 1. Those that it filters out and those of its replay do not count.
func WithBufferSize(n int) WatchOption { return func(o *watchOptions) { o.limit = n } }

type watchOptions struct {
	initial, resume bool // whether WithInitialReplay, WithSince was given
	since           int64
	prefix          string
	types           []EventType // nil: all
	limit           int
}

func (o *watchOptions) check() error {
	switch {
	case o.initial && o.resume:
		return errors.New("WithInitialReplay and WithSince exclude each other")
	case o.resume && o.since < 0:
		return fmt.Errorf("negative revision %d", o.since)
	case o.limit < 1:
		return fmt.Errorf("buffer size %d is below 1", o.limit)
	}
	for _, t := range o.types {
		if t != EventCreate && t != EventUpdate && t != EventDelete {
			return fmt.Errorf("unknown event type %q", string(t))
		}
	}
	return nil
}

func (c *core[T, V]) Watch(ctx context.Context, kind string, opts ...WatchOption) (<-chan Event[T], error) {
	w := &watch[T]{kind: kind, wake: make(chan struct{}, 1), settle: make(chan struct{})}
	w.limit = DefaultWatchBufferSize
	err := c.call(place{"watch", kind}, func() error {
		for _, opt := range opts {
			if opt != nil {
				opt(&w.watchOptions)
			}
		}
		if err := w.check(); err != nil {
			return err
		}
		if ctx == nil {
			return errors.New("context is nil")
		}
		if ctx.Err() != nil {
			return asIs(ctx.Err())
		}
		w.ctx, w.cancel = context.WithCancel(ctx)
		w.ch = make(chan Event[T], min(w.limit, 64))
		started := make(chan error, 1)
		c.hub.running.Add(1) // Close waits for this call first
		go c.run(w, started)
		return <-started
	})
	if err != nil {
		return nil, err
	}
	return w.ch, nil
}

// run is the life of a watch. It says in started how it began. What it is to
// replay is held in memory, so that no consumer can hold up a snapshot, and
// with it SQLite's write-ahead log.
func (c *core[T, V]) run(w *watch[T], started chan<- error) {
	defer c.hub.running.Done()
	defer close(w.ch)
	defer w.cancel()
	defer c.hub.remove(w)
	var past []Event[V]
	err := c.engine.view(func(s snapshot[V]) (err error) {
		// From here on the hub hands over every change that is not in s.
		if err = c.hub.add(w, s.revision, c.tail); err != nil {
			return err
		}
		switch {
		case w.resume && w.since > w.from:
			return ErrCompacted
		case w.resume:
			for ev, err := range s.history(w.since) {
				if err != nil {
					return err
				}
				if w.wants(ev.Type, ev.Kind, ev.Key) {
					past = append(past, ev)
				}
			}
		case w.initial && w.wants(EventCreate, w.kind, w.prefix):
			for e, err := range s.scan(w.kind, Range{Prefix: w.prefix}) {
				if err != nil {
					return err
				}
				past = append(past, *e.event(EventCreate))
			}
		}
		return nil
	})
	started <- err
	if err == nil && c.replay(w, past) {
		w.live()
	}
}

// replay sends the past, and says whether the watch is to go on.
func (c *core[T, V]) replay(w *watch[T], past []Event[V]) bool {
	for len(past) > 0 {
		if w.ctx.Err() != nil {
			return false
		}
		some := past[:min(len(past), 16)]
		for _, ev := range c.events(some) {
			if !w.send(*ev) {
				return false
			}
		}
		clear(some) // hold no longer than needed
		past = past[len(some):]
	}
	if !w.initial && !w.resume {
		return true
	}
	return w.send(Event[T]{Type: EventSynced, Kind: w.kind, Revision: w.from})
}

// events decodes changes. It does so on a goroutine of its own, since a codec
// may panic or call Goexit, which must end neither the watch nor the program.
func (c *core[T, V]) events(changes []Event[V]) (events []*Event[T]) {
	decode := func(done chan<- struct{}) {
		defer close(done)
		var ev *Event[T]
		fail := func(err error) { ev.Err = place{"watch", ev.Kind, ev.Key}.fail(err) }
		end := errors.New("codec called Goexit")
		defer func() {
			if p := recover(); p != nil {
				end = fmt.Errorf("codec panicked: %v", p)
			}
			if end != nil {
				fail(end)
			}
		}()
		for _, ch := range changes[len(events):] {
			ev = &Event[T]{Type: ch.Type, Kind: ch.Kind, Key: ch.Key, Version: ch.Version, Revision: ch.Revision}
			events = append(events, ev)
			var err error
			if ev.Value, err = c.decode(ch.Value); err != nil {
				fail(err)
			}
		}
		end = nil
	}
	for len(events) < len(changes) {
		done := make(chan struct{})
		go decode(done)
		<-done
	}
	return events
}

// tail publishes the changes after a revision until stop is closed. Nothing is
// decoded that nobody watches. What can't be had ends the watches that wait for
// it.
func (c *core[T, V]) tail(since int64, stop <-chan struct{}) {
	h := &c.hub
	defer h.running.Done()
	for {
		more := false
		changes, err := c.engine.changes(since)
		if len(changes) > 0 {
			since = changes[len(changes)-1].Revision
			h.mu.Lock()
			changes = slices.DeleteFunc(changes, func(ch Event[V]) bool {
				return !slices.ContainsFunc(h.watches, func(w *watch[T]) bool { return w.wants(ch.Type, ch.Kind, ch.Key) })
			})
			h.mu.Unlock()
			more = h.publish(stop, c.events(changes)) // a codec must not run under the lock
		} else if err != nil {
			next := h.lost(stop, since, err)
			more, since = next > since, next
		}
		if !more && !c.engine.wait(stop) {
			return
		}
	}
}

// A gapError is ErrCompacted at a gap in the history. It is the revision after
// which the history goes on.
type gapError int64

func (gapError) Error() string        { return ErrCompacted.Error() }
func (gapError) Is(target error) bool { return target == ErrCompacted }

// hub is the broadcast from a store's writers, or from its tail, to its
// watches. An engine's lock may be held when mu is taken, never the other way
// round; mu may be held when a watch's mu is taken.
type hub[T any] struct {
	running sync.WaitGroup // watches and tails
	count   atomic.Int64   // len(watches)

	mu      sync.Mutex    // held while publishing, so that events stay in order
	watches []*watch[T]   // protected by mu
	stop    chan struct{} // protected by mu; ends the running tail; nil: none runs
}

// add makes w receive every change after the revision that now returns. The
// first watch starts a tail there.
func (h *hub[T]) add(w *watch[T], now func() (int64, error), tail func(since int64, stop <-chan struct{})) (err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if w.from, err = now(); err != nil {
		return err
	}
	h.watches = append(h.watches, w)
	h.count.Store(int64(len(h.watches)))
	if h.stop == nil {
		h.stop = make(chan struct{})
		h.running.Add(1) // w runs, so nobody has waited yet
		go tail(w.from, h.stop)
	}
	return nil
}

// remove forgets w. With the last watch the tail ends.
func (h *hub[T]) remove(w *watch[T]) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watches = slices.DeleteFunc(h.watches, func(other *watch[T]) bool { return other == w })
	h.count.Store(int64(len(h.watches)))
	if len(h.watches) == 0 && h.stop != nil {
		close(h.stop)
		h.stop = nil
	}
}

// publish hands events to whom they concern. It returns false if the tail that
// calls it, if any, is not the running one any more.
func (h *hub[T]) publish(tail <-chan struct{}, events []*Event[T]) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if tail != nil && tail != h.stop {
		return false
	}
	for _, ev := range events {
		for _, w := range h.watches {
			if w.from < ev.Revision && w.wants(ev.Type, ev.Kind, ev.Key) {
				w.offer(ev)
			}
		}
	}
	return true
}

// lost ends the watches that wait for what can't be had after a revision, and
// returns the revision after which the history goes on.
func (h *hub[T]) lost(tail <-chan struct{}, since int64, err error) int64 {
	upTo, next := int64(math.MaxInt64), since
	gap, isGap := err.(gapError)
	if isGap {
		upTo, next = int64(gap), int64(gap)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, w := range h.watches {
		if tail == h.stop && w.from < upTo {
			reason := ErrCompacted
			if !isGap {
				reason = place{"watch", w.kind}.fail(err)
			}
			w.mu.Lock()
			w.stopLocked(reason, max(since, w.from))
			w.mu.Unlock()
		}
	}
	return next
}

// end ends every watch.
func (h *hub[T]) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, w := range h.watches {
		w.cancel()
	}
}

func (h *hub[T]) watched() bool { return h.count.Load() > 0 }

// watch is a bounded queue of undelivered changes, and the goroutine that
// alone sends on and closes ch. It ends with ctx, or
// after an EventError.
type watch[T any] struct {
	watchOptions
	kind   string
	ctx    context.Context // ends with the caller's, or when the store closes
	cancel context.CancelFunc
	ch     chan Event[T]
	from   int64         // live changes come after this revision
	wake   chan struct{} // gets a token when there is something to do
	settle chan struct{} // live takes from it when it has counted what it sent

	mu      sync.Mutex
	queue   []*Event[T] // protected by mu; changes that did not go into ch yet
	sent    int         // protected by mu; changes that did
	counts  bool        // protected by mu; live has begun
	stopped bool        // protected by mu; an EventError is the last in queue
}

func (w *watch[T]) wants(what EventType, kind, key string) bool {
	return w.kind == kind && strings.HasPrefix(key, w.prefix) && (w.types == nil || slices.Contains(w.types, what))
}

// offer queues a change, unless the watch holds too many.
func (w *watch[T]) offer(ev *Event[T]) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fullLocked() && w.counts && !w.stopped {
		// The consumer may have taken what live has not counted yet.
		w.mu.Unlock()
		select {
		case w.settle <- struct{}{}:
		case <-w.ctx.Done():
		}
		w.mu.Lock()
	}
	if w.fullLocked() {
		w.stopLocked(ErrWatchOverflow, ev.Revision-1)
	} else if !w.stopped {
		w.queue = append(w.queue, ev)
		try(w.wake, struct{}{})
	}
}

// fullLocked relies on what was sent last being what is left in ch.
func (w *watch[T]) fullLocked() bool {
	return len(w.queue)+min(w.sent, len(w.ch)) >= w.limit
}

// stopLocked makes the watch end with err when it has delivered what it holds.
func (w *watch[T]) stopLocked(err error, complete int64) {
	if !w.stopped {
		w.stopped = true
		w.queue = append(w.queue, &Event[T]{Type: EventError, Kind: w.kind, Revision: complete, Err: err})
		try(w.wake, struct{}{})
	}
}

// live sends what is queued until the watch ends.
func (w *watch[T]) live() {
	for w.ctx.Err() == nil {
		w.mu.Lock()
		n := 0
		for n < min(len(w.queue), 64) && try(w.ch, *w.queue[n]) {
			n++
		}
		rest, stopped := w.shiftLocked(n), w.stopped
		w.counts = true
		w.mu.Unlock()
		var next Event[T]
		var ch chan Event[T] // nil: nothing to send
		if len(rest) > 0 {
			ch, next = w.ch, *rest[0] // it stays in the queue, and counts, until it is sent
		} else if stopped {
			return
		}
		select {
		case ch <- next:
			w.mu.Lock()
			w.shiftLocked(1)
			w.mu.Unlock()
		case <-w.wake:
		case <-w.settle:
		case <-w.ctx.Done():
		}
	}
}

// shiftLocked takes from the queue what was sent, and returns the rest.
func (w *watch[T]) shiftLocked(n int) []*Event[T] {
	w.sent += n
	clear(w.queue[:n]) // hold no longer than needed
	switch {
	case n < len(w.queue):
		w.queue = w.queue[n:]
	case cap(w.queue) > 1024:
		w.queue = nil // after a burst
	default:
		w.queue = w.queue[:0]
	}
	return w.queue
}

// send delivers, unless the watch ends before the consumer takes it.
func (w *watch[T]) send(ev Event[T]) bool {
	select {
	case w.ch <- ev:
		return true
	case <-w.ctx.Done():
		return false
	}
}

// try sends if it can do so at once.
func try[E any](ch chan<- E, e E) bool {
	select {
	case ch <- e:
		return true
	default:
		return false
	}
}
