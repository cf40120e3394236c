package zestor

import (
	"maps"
	"reflect"
	"slices"
	"sort"
	"sync"
	"time"
)

// NewMemStore returns a store in memory, for caches, tests and scratch data. It keeps nothing after Close.
func NewMemStore[T any](opts StoreOptions[T]) Store[T] {
	e := &memEngine[T]{hub: new(hub[T, T]), kinds: make(map[string]*memKind[T])}
	return &memStore[T]{newStore(&core[T, T]{engine: e, hub: e.hub, options: opts, equal: equality[T](),
		encode: func(_, _ string, value T) (T, error) { return value, nil },
		decode: func(value T) (T, error) { return value, nil }}), e}
}

// memStore has quick paths for what programs do most. Each does what the store does, or calls it. They
// don't look whether it is open: they answer until Close has emptied the engine, and then call the store.
type memStore[T any] struct {
	*store[T, T]
	e *memEngine[T]
}

func (s *memStore[T]) Get(kind, key string) (value T, ok bool, err error) {
	s.e.mu.RLock()
	r, closed := s.e.row(kind, key), s.e.kinds == nil
	if r != nil {
		value = r.value
	}
	s.e.mu.RUnlock()
	if r == nil && (closed || place{"get", kind, key}.check() != nil) {
		return s.store.Get(kind, key) // an error
	}
	return value, r != nil, nil
}

func (s *memStore[T]) List(kind string, filters ...FilterFunc[T]) (map[string]T, error) {
	s.e.mu.RLock()
	k := s.e.kinds[kind]
	if k == nil || len(filters) > 0 {
		s.e.mu.RUnlock()
		return s.store.List(kind, filters...)
	}
	defer s.e.mu.RUnlock()
	list := make(map[string]T, len(k.rows))
	for key, r := range k.rows {
		list[key] = r.value
	}
	return list, nil
}

func (s *memStore[T]) Set(kind, key string, value T) (SetResult, error) {
	s.e.mu.Lock()
	r := s.e.row(kind, key)
	if r == nil || s.nilable || s.options.CompareFn != nil || s.options.ValidateFns[kind] != nil {
		s.e.mu.Unlock()
		return s.store.Set(kind, key, value) // a create, callbacks, or an error
	}
	defer s.e.mu.Unlock()
	if s.equal(r.value, value) {
		return SetUnchanged, nil
	}
	s.e.newest++
	*r = memRow[T]{value, r.version + 1, s.e.newest, time.Now().UnixMilli()}
	if s.e.hub.watched.Load() {
		s.e.hub.publish(0, 0, nil, r.entry(kind, key).event(EventUpdate))
	}
	return SetUpdated, nil
}

// memEngine is a map of kinds behind a mutex, and the snapshot or transaction of whoever holds that.
type memEngine[T any] struct {
	hub *hub[T, T] // gets events while mu is locked, so that they come in the order of writes

	mu      sync.RWMutex
	kinds   map[string]*memKind[T] // protected by mu
	recent  *memKind[T]            // protected by mu; the kind changed last, found without a lookup; nil: none
	newest  int64                  // protected by mu; the revision
	undo    []func()               // protected by mu; takes back the transaction's changes, one each
	changes []*Event[T]            // protected by mu; the same changes, if somebody watches
}

// kind returns an empty memKind if the kind is absent.
func (e *memEngine[T]) kind(kind string) *memKind[T] {
	if e.recent != nil && e.recent.name == kind {
		return e.recent
	}
	if k := e.kinds[kind]; k != nil {
		return k
	}
	return &memKind[T]{name: kind, rows: make(map[string]*memRow[T])}
}

// row returns nil if the key is absent.
func (e *memEngine[T]) row(kind, key string) *memRow[T] { return e.kind(kind).rows[key] }

type memRow[T any] struct {
	value    T
	version  int64
	revision int64
	millis   int64 // since 1970
}

func (r *memRow[T]) entry(kind, key string) Entry[T] {
	return Entry[T]{kind, key, r.value, r.version, r.revision, time.UnixMilli(r.millis).UTC()}
}

// memKind is the rows of one kind, and an index of their keys.
type memKind[T any] struct {
	name string
	rows map[string]*memRow[T] // protected by the engine's mu, with what is pointed at

	// The index is made, and brought up to date, when somebody needs it, under the engine's read lock.
	indexMu sync.Mutex
	sorted  []string // the index; protected by the engine's mu, or its read lock and indexMu; nil: not made
	changed []string // protected likewise; keys that came or went since it was made
}

func (e *memEngine[T]) read(_ bool, fn func(snapshot[T]) error) error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return fn(e)
}

func (e *memEngine[T]) write(_ bool, fn func(transaction[T]) error) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer func() { // also after a panic or Goexit
		for _, undo := range slices.Backward(e.undo) {
			undo()
		}
		e.newest -= int64(len(e.undo)) // each change had taken one
		e.undo, e.changes = nil, nil
	}()
	if err := fn(e); err != nil {
		return err
	}
	e.undo = nil
	e.hub.publish(0, 0, nil, e.changes...)
	return nil
}

func (e *memEngine[T]) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.kinds, e.recent = nil, nil
}

func (e *memEngine[T]) get(kind, key string, _ bool) (found Entry[T]) {
	if r := e.row(kind, key); r != nil {
		found = r.entry(kind, key)
	}
	return found
}

func (e *memEngine[T]) scan(kind string, r Range, _ bool, each func(Entry[T]) bool) {
	if kind == "" {
		for kind := range e.kinds {
			e.scan(kind, r, true, each)
		}
		return
	}
	k := e.kind(kind)
	keys := k.order()
	lo, hi := r.bounds()
	from, _ := slices.BinarySearch(keys, lo)
	to := sort.Search(len(keys), func(n int) bool { return hi != "" && keys[n] >= hi })
	keys = keys[from:max(from, to)] // hi may be below lo
	for n := range keys {
		key := keys[n]
		if r.Descending {
			key = keys[len(keys)-1-n]
		}
		if r.Limit--; !each(k.rows[key].entry(kind, key)) || r.Limit == 0 { // 0 at first never comes to 0
			break
		}
	}
}

func (e *memEngine[T]) keys(kind string) []string { return append([]string{}, e.kind(kind).order()...) }

func (e *memEngine[T]) count(kind string) int { return len(e.kind(kind).rows) }

func (e *memEngine[T]) revision() int64 { return e.newest }

func (e *memEngine[T]) failure() error { return nil }

// history has nothing to tell: the memory store keeps none.
func (e *memEngine[T]) history(since int64, _ func(*Event[T]) bool) error {
	if since != e.newest {
		return ErrCompacted
	}
	return nil
}

func (e *memEngine[T]) put(kind, key string, value T) {
	what, r := EventCreate, &memRow[T]{value, 1, e.newest + 1, time.Now().UnixMilli()}
	if old := e.row(kind, key); old != nil {
		what, r.version = EventUpdate, old.version+1
	}
	e.change(what, r.entry(kind, key), r)
}

func (e *memEngine[T]) putMany([]Entry[T]) bool { return false }

func (e *memEngine[T]) remove(old Entry[T]) { e.change(EventDelete, old, nil) }

// change is a write that can be undone and watched.
func (e *memEngine[T]) change(what EventType, now Entry[T], r *memRow[T]) {
	old := e.replace(now.Kind, now.Key, r)
	e.undo = append(e.undo, func() { e.replace(now.Kind, now.Key, old) })
	e.newest++
	now.Revision = e.newest // which a put knew; a delete gets it here
	if e.hub.watched.Load() {
		e.changes = append(e.changes, now.event(what))
	}
}

// replace stores r under a key, or removes the key, and returns what was there.
func (e *memEngine[T]) replace(kind, key string, r *memRow[T]) (old *memRow[T]) {
	k := e.kind(kind)
	e.kinds[kind], e.recent = k, k
	old = k.rows[key]
	if r != nil {
		k.rows[key] = r
	} else {
		delete(k.rows, key)
	}
	switch {
	case len(k.rows) == 0:
		delete(e.kinds, kind)
		e.recent = nil
	case len(k.changed) >= len(k.sorted)/2:
		k.sorted, k.changed = nil, nil // not worth mending: cheaper made anew, if it was made at all
	case old == nil || r == nil:
		k.changed = append(k.changed, key)
	}
	return old
}

// order returns the keys, sorted. The caller has locked the engine, and must not change them.
func (k *memKind[T]) order() []string {
	k.indexMu.Lock()
	defer k.indexMu.Unlock()
	if k.sorted == nil {
		k.sorted = slices.Sorted(maps.Keys(k.rows))
	}
	if len(k.changed) > 0 {
		slices.Sort(k.changed)
		merged, rest := make([]string, 0, len(k.rows)), k.sorted
		for _, key := range slices.Compact(k.changed) {
			n, found := slices.BinarySearch(rest, key)
			merged, rest = append(merged, rest[:n]...), rest[n:]
			if found {
				rest = rest[1:]
			}
			if k.rows[key] != nil {
				merged = append(merged, key)
			}
		}
		k.sorted, k.changed = append(merged, rest...), nil
	}
	return k.sorted
}

// equality returns reflect.DeepEqual, or == where that is the same.
func equality[T any]() func(a, b T) bool {
	if isPlain(reflect.TypeFor[T]()) {
		return func(a, b T) bool { return any(a) == any(b) }
	}
	return func(a, b T) bool { return reflect.DeepEqual(a, b) }
}

// isPlain says that == and DeepEqual agree on values of t: they hold no pointers, interfaces or the like.
func isPlain(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Array:
		return isPlain(t.Elem())
	case reflect.Struct:
		plain := true
		for i := range t.NumField() {
			plain = plain && isPlain(t.Field(i).Type)
		}
		return plain
	}
	return t.Kind() == reflect.String || t.Kind() >= reflect.Bool && t.Kind() <= reflect.Complex128
}
