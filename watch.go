package zestor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
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

// Event is one step of a watch. An event of create, update or delete is a change, or in an initial
// replay an entry. EventSynced and EventError have no Key, Value and Version; their Revision is the
// one up to which the watch is complete, or -1: [Watcher] says how to go on from there.
type Event[T any] struct {
	Type     EventType
	Kind     string
	Key      string
	Value    T     // delete: the value that was deleted
	Version  int64 // delete: the version that was deleted
	Revision int64 // of the change, or of the entry
	Err      error // why the watch ends; or why Value could not be decoded and is zero: the watch goes on
}

func (e Entry[V]) event(what EventType) *Event[V] {
	return &Event[V]{what, e.Kind, e.Key, e.Value, e.Version, e.Revision, nil}
}

// WatchOption is an option of Watch. A nil one is skipped; of a repeated one the last holds.
type WatchOption func(*watchOptions)

// DefaultWatchBufferSize is how many undelivered changes a watch may hold. It allocates nothing.
const DefaultWatchBufferSize = 65536

// WithInitialReplay first sends every current entry, as creates in key order with the entry's own
// version and revision, and then an EventSynced, whose Revision is the first to go on from.
func WithInitialReplay() WatchOption { return func(o *watchOptions) { o.initial = true } }

// WithSince first sends every change after a revision, in order, and then an EventSynced. A SQLite
// file keeps the newest changes, across restarts too, see SQLiteOptions.HistoryBytes. The memory
// store keeps none: only the newest revision will do. One that the history does not reach from, too
// old or new, is ErrCompacted; a negative one is another error, as is WithInitialReplay beside it.
func WithSince(revision int64) WatchOption { return func(o *watchOptions) { o.since = &revision } }

// WithPrefix sends only changes of keys that start with it, and the replay's EventSynced.
func WithPrefix(prefix string) WatchOption { return func(o *watchOptions) { o.prefix = prefix } }

// WithEventTypes sends only these of create, update and delete, none if it is given none; any other
// is an error. The entries of an initial replay are creates.
func WithEventTypes(types ...EventType) WatchOption {
	types = append([]EventType{}, types...) // not nil, even for none
	return func(o *watchOptions) { o.types = types }
}

// WithBufferSize sets how many undelivered changes the watch may hold, at least 1. Those that it
// filters out and those of its replay do not count, nor in SQLite those yet to be read from the log.
func WithBufferSize(n int) WatchOption { return func(o *watchOptions) { o.limit = n } }

type watchOptions struct {
	initial bool   // whether WithInitialReplay was given
	since   *int64 // nil: WithSince was not
	prefix  string
	types   []EventType // nil: all
	limit   int
}

func (st *store[T, V]) Watch(ctx context.Context, kind string, opts ...WatchOption) (ch <-chan Event[T], err error) {
	w := &watch[T, V]{kind: kind, wake: make(chan struct{}, 1)}
	w.limit, w.counted.L = DefaultWatchBufferSize, &w.mu
	var ended error // ctx's, which comes back as it is
	err = st.call(&place{"watch", kind}, func() error {
		for _, opt := range opts {
			if opt != nil {
				opt(&w.watchOptions)
			}
		}
		unknown := func(t EventType) bool { return t != EventCreate && t != EventUpdate && t != EventDelete }
		switch {
		case w.initial && w.since != nil:
			return errors.New("WithInitialReplay and WithSince exclude each other")
		case w.since != nil && *w.since < 0:
			return fmt.Errorf("negative revision %d", *w.since)
		case w.limit < 1:
			return fmt.Errorf("buffer size %d is below 1", w.limit)
		case slices.ContainsFunc(w.types, unknown):
			return fmt.Errorf("unknown event type in %q", w.types)
		case ctx == nil:
			return errors.New("context is nil")
		case ctx.Err() != nil:
			ended = ctx.Err()
			return ended
		}
		w.done, w.stop = ctx.Done(), context.AfterFunc(ctx, func() { try(w.wake, struct{}{}) })
		size := int(reflect.TypeFor[Event[T]]().Size())
		w.ch = make(chan Event[T], max(1, min(w.limit, 64, 16<<10/size))) // at most 16 KiB, or one
		if err := st.begin(w); err != nil {
			st.hub.remove(w)
			return err
		}
		go st.deliver(w, nil)
		ch = w.ch
		return nil
	})
	return ch, cmp.Or(ended, err)
}

// begin adds w to the hub and queues its replay, which is held in memory so that no consumer can
// hold up a snapshot, and with it SQLite's write-ahead log.
func (c *core[T, V]) begin(w *watch[T, V]) error {
	var past []*Event[V]
	replay := func(ev *Event[V]) bool {
		if w.wants(ev) {
			past = append(past, ev)
		}
		return true
	}
	err := c.engine.read(true, func(s snapshot[V]) error {
		if err := c.add(w, s); err != nil {
			return err
		} else if w.since != nil {
			return s.history(*w.since, replay)
		} else if w.initial && w.wants(&Event[V]{Type: EventCreate, Kind: w.kind, Key: w.prefix}) {
			s.scan(w.kind, Range{Prefix: w.prefix}, true, func(e Entry[V]) bool { return replay(e.event(EventCreate)) })
		}
		return nil
	})
	if w.initial || w.since != nil {
		past = append(past, &Event[V]{Type: EventSynced, Kind: w.kind, Revision: w.from})
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.queue = append(past, w.queue...)
	return err
}

// deliver sends what is queued until the watch ends. A codec that panics or calls Goexit ends only
// the goroutine: another goes on, with that failure for the first in queue.
func (c *core[T, V]) deliver(w *watch[T, V], failure error) {
	ended := false
	defer func() {
		if !ended {
			go c.deliver(w, fmt.Errorf("codec panicked or called Goexit: %v", recover()))
			return
		}
		close(w.ch)
		c.hub.remove(w)
	}()
	var ev Event[T]      // the first in queue, if it is decoded
	var ch chan Event[T] // where to send it; nil: it is not
	sent := false        // it has gone into ch, and is yet to be counted
	for {
		over := c.hub.ended.Load()
		select {
		case <-w.done: // not in the select below: in a synctest bubble it may be from outside
			over = true
		default:
		}
		w.mu.Lock()
		if sent || !over && try(ch, ev) { // else ch is nil or full: select can send only after the consumer has taken one
			ended = w.queue[0].Type == EventError
			w.queue[0], ev = nil, Event[T]{} // hold no longer than needed
			if w.queue = w.queue[1:]; len(w.queue) == 0 {
				w.queue = nil
			}
			ch, sent = nil, false
		}
		ended = ended || over
		w.blocked = ch != nil && !ended
		w.counted.Signal() // now queue and ch hold just what is undelivered
		var next *Event[V]
		if ch == nil && len(w.queue) > 0 {
			next = w.queue[0]
		}
		w.mu.Unlock()
		switch {
		case ended:
			return
		case next != nil:
			var value T
			if next.Type != EventSynced && next.Err == nil && failure == nil {
				value, failure = c.decode(next.Value)
			}
			err := cmp.Or(next.Err, place{"watch", next.Kind, next.Key}.fail(failure))
			ev = Event[T]{next.Type, next.Kind, next.Key, value, next.Version, next.Revision, err}
			ch, failure = w.ch, nil
			continue
		}
		select {
		case ch <- ev:
			sent = true
		case <-w.wake:
		}
	}
}

// hub is the broadcast from writers, or the tail, to watches. Lock order: the engine's, mu, a watch's.
type hub[T, V any] struct {
	watched atomic.Bool   // whether there are watches
	ended   atomic.Bool   // the store closes, and with it every watch
	wake    chan struct{} // wakes the tail, which publishes; nil: there is none, the writers publish

	mu      sync.Mutex     // held while publishing, so that events stay in order
	watches []*watch[T, V] // protected by mu
	tailing bool           // protected by mu; the tail runs
	newest  atomic.Int64   // changed under mu, read without; the revision that the file is known to have come to
	gone    sync.Cond      // on mu; signaled when a watch or the tail is gone, for Close
}

// add makes w receive all changes that are not in s, and starts the tail. Its read is the first of s, at
// which SQLite takes the snapshot: mu is locked, so that nothing is published in between.
func (c *core[T, V]) add(w *watch[T, V], s snapshot[V]) error {
	h := c.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	w.from = s.revision()
	if w.from < h.newest.Load() { // somebody has restored an older state, which the tail will find
		return ErrCompacted
	}
	h.newest.Store(w.from)
	h.watches = append(h.watches, w)
	h.watched.Store(true)
	if h.wake != nil && !h.tailing {
		h.tailing = true
		go c.tail(w.from)
	}
	return nil
}

// remove forgets w. After the last watch the tail ends, which it is woken for.
func (h *hub[T, V]) remove(w *watch[T, V]) {
	w.stop()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watches = slices.DeleteFunc(h.watches, func(other *watch[T, V]) bool { return other == w })
	h.watched.Store(len(h.watches) > 0)
	h.gone.Signal()
	try(h.wake, struct{}{})
}

// publish hands changes to the watches that want them. An error says why those after since can't be had:
// it ends the watches that wait for them and, where an older state was restored, also those that began
// up to lost, the newest revision before that. The tail is to go on after next, or to end if that is -1.
func (h *hub[T, V]) publish(since, lost int64, err error, changes ...*Event[V]) (next int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	next = -1
	newest := int64(0)
	for _, w := range h.watches {
		for _, ev := range changes {
			if !w.over && w.from < ev.Revision && w.wants(ev) {
				w.offer(ev)
			}
		}
		at := max(since, w.from)
		if err != nil && !w.over && w.from <= max(since, lost) {
			end := &Event[V]{Type: EventError, Kind: w.kind, Revision: at, Err: err}
			if err != ErrCompacted {
				end.Err = place{"watch", w.kind}.fail(err)
			}
			w.offer(end)
		}
		if !w.over {
			if newest = max(newest, at); next < 0 || at < next {
				next = at
			}
		}
	}
	h.newest.Store(newest)
	h.tailing = h.wake != nil && next >= 0
	h.gone.Signal()
	return next
}

// end ends every watch, also those that are yet to be added.
func (h *hub[T, V]) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended.Store(true)
	for _, w := range h.watches {
		try(w.wake, struct{}{})
	}
}

// wait returns when every watch and the tail are gone.
func (h *hub[T, V]) wait() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.gone.L = &h.mu // only Wait needs it
	for len(h.watches) > 0 || h.tailing {
		h.gone.Wait()
	}
}

// watch is a bounded queue of undelivered changes, and the goroutine that alone sends on and closes
// ch. It ends with ctx, or after an EventError.
type watch[T, V any] struct {
	watchOptions
	kind string
	done <-chan struct{} // the context's
	stop func() bool     // the context's end wakes the watch no more
	ch   chan Event[T]
	from int64         // live changes come after this revision
	over bool          // protected by the hub's mu; it has got an EventError and takes no more
	wake chan struct{} // gets a token when there is something to do

	mu      sync.Mutex
	queue   []*Event[V] // protected by mu; what did not go into ch yet
	live    int         // protected by mu; changes that were ever queued, without the replay
	blocked bool        // protected by mu; deliver may have sent what it has not counted
	counted sync.Cond   // on mu; signaled by deliver alone, each time that it has counted
}

func (w *watch[T, V]) wants(ev *Event[V]) bool {
	return w.kind == ev.Kind && strings.HasPrefix(ev.Key, w.prefix) && (w.types == nil || slices.Contains(w.types, ev.Type))
}

// offer queues an EventError or a change, or in its place an overflow if the watch holds too many.
func (w *watch[T, V]) offer(ev *Event[V]) {
	w.mu.Lock()
	defer w.mu.Unlock()
	// A replay is delivered first: of what is undelivered, at most the last w.live are live changes.
	full := func() bool { return ev.Type != EventError && min(len(w.queue)+len(w.ch), w.live) >= w.limit }
	if full() && w.blocked { // what deliver has sent may still be in queue, counted twice; it waits for nobody
		try(w.wake, struct{}{})
		w.counted.Wait() // once: deliver signals only when it has counted
	}
	if full() {
		ev = &Event[V]{Type: EventError, Kind: w.kind, Revision: ev.Revision - 1, Err: ErrWatchOverflow}
	}
	w.queue, w.live, w.over = append(w.queue, ev), w.live+1, ev.Type == EventError
	try(w.wake, struct{}{})
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
