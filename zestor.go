// Package zestor is a typed key-value store that a program can watch: a map in memory, or one
// SQLite file for data that must survive. Both behave the same: to swap them, change the call that makes it.
//
//	s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[User]{DSN: "app.db"})
//	if err != nil {
//		log.Fatal(err)
//	}
//	defer s.Close()
//	events, _ := s.Watch(context.Background(), "users", zestor.WithInitialReplay())
//	s.Set("users", "alice", User{Name: "Alice"})
//	for ev := range events { // until the store closes
//		fmt.Println(ev.Type, ev.Key, ev.Value.Name)
//	}
//
// Values live in kinds (think tables). Inside a kind, a key names one value of type T. Kinds and
// keys are any non-empty strings of bytes, and sort bytewise.
//
// # Ownership
//
// Values are shared, not copied: see [Store].
//
// # Watching
//
// A watch reports every change, in a SQLite file also those of other processes and of the sqlite3
// shell. It loses none in silence, and no writer waits for its consumer: see [Watcher].
//
// # Durability
//
// In SQLite, a write that has returned survives the death of the process and, as far as fsync
// reaches, of the machine, unless the DSN lowers the synchronous level: with NORMAL a power cut can
// take the newest writes, with OFF damage the file. A transaction is there whole or not at all.
//
// # Callbacks
//
// Functions and codecs handed to a store may run on several goroutines at once, and while it is
// locked: they must not call it, which would deadlock. One that panics or calls [runtime.Goexit]
// leaves it unlocked, unchanged, usable.
//
// # Caveats
//
// There is one writer at a time. In a file in WAL mode a long Scan or View lets the write-ahead log
// grow, and may hold up writers for 3 seconds or so; elsewhere readers and writers wait for each other,
// and readers also behind a writer that waits. In a file each Scan or View under way takes two file
// descriptors, one of which SQLite keeps for the next until Close. A watch first reads its whole replay
// into memory. Whoever stops reading its channel should end its context. In memory 0 equals -0, and NaN
// not itself; in SQLite that is up to their encodings.
package zestor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The errors to tell apart with [errors.Is]: wrapped in operation, kind and key, or bare in an [EventError].
var (
	ErrClosed        = errors.New("zestor: store is closed")                   // any call on a closed store
	ErrKindRequired  = errors.New("zestor: kind required")                     // a kind is empty
	ErrKeyRequired   = errors.New("zestor: key required")                      // a key is empty
	ErrKeyNotFound   = errors.New("zestor: key not found")                     // SetFn on a key that does not exist
	ErrConflict      = errors.New("zestor: revision conflict")                 // SetIf: the entry is not at the revision that the caller saw
	ErrTxDone        = errors.New("zestor: transaction is done")               // a tx is used after its View or Update has returned
	ErrWatchOverflow = errors.New("zestor: watch overflow: consumer too slow") // a watch ended because its consumer fell too far behind
	ErrCompacted     = errors.New("zestor: history compacted: start over")     // the history that a watch needs is not there
)

// Reader reads: the newest committed state on a store, and a transaction's own on its tx. An absent
// key is ok == false and never an error; an absent kind is empty. A value that cannot be decoded,
// because another program or another type wrote it, is an error that names its kind and key.
type Reader[T any] interface {
	// Get returns the value of a key, or the zero T and false.
	Get(kind, key string) (value T, ok bool, err error)

	// GetEntry returns a value with its version, revision and time. If the value cannot be decoded,
	// the rest comes with true and the error.
	GetEntry(kind, key string) (entry Entry[T], ok bool, err error)

	// List returns the values that pass every filter, by key; nil filters are skipped. The map is
	// the caller's, and not nil without an error. A value that cannot be decoded fails List, Values
	// and GetAll as a whole.
	List(kind string, filters ...FilterFunc[T]) (map[string]T, error)

	Keys(kind string) ([]string, error)     // the keys of a kind, sorted; not nil without an error
	Values(kind string) ([]Entry[T], error) // its entries, sorted by key; not nil without an error
	Count(kind string) (int, error)         // the number of its keys, which SQLite has to count

	// GetAll returns all values by kind and key, without kinds that have no keys. It is for files
	// that hold only values of type T.
	GetAll() (map[string]map[string]T, error)

	// Scan iterates over the entries of a kind that r selects, sorted by key, in one snapshot,
	// taken when the range starts and anew when it is ranged over again. The body may call the
	// store (not Close) and scan inside: it goes on seeing the state at its start.
	//
	// An entry whose value cannot be decoded comes with the error, and the iteration goes on. Any
	// other error comes with a zero Entry and ends it.
	//
	// A SQLite file in WAL mode streams in constant memory, in View too. In Update, in ":memory:",
	// without WAL, with immutable=1 and in the memory store what r selects is collected first.
	Scan(kind string, r Range) iter.Seq2[Entry[T], error]

	// Revision returns the number of the newest committed change, 0 for a new store; in Update that
	// of the transaction's own newest. Every change takes the next number, deletes too, without
	// holes, and none is used again but what a transaction took that was rolled back.
	Revision() (int64, error)
}

// Writer writes. Every write checks, in this order: that the store is open, the kind, the key, that
// the value is no nil pointer, the kind's validator, the encoding, for SetIf the revision, and
// whether the value changes: if it is equal to what is stored, nothing is written, no revision is
// taken and no event sent. With an error nothing is written either. Kind and key may have about
// 1e9 bytes together, in SQLite with the encoded value; more is an error.
type Writer[T any] interface {
	// Set stores a value, zero values too, and says whether the key is new, updated or unchanged.
	Set(kind, key string, value T) (SetResult, error)

	// SetFn replaces the value of a key with what fn returns for it, and says whether that was a
	// change. An absent key is [ErrKeyNotFound]; an error of fn comes back wrapped.
	//
	// fn must not call the store. It must return a new value and leave the old alone: in memory,
	// a pointer or map changed in place is its own previous value, so nothing is written or sent.
	//
	// A counter that starts from nothing is an Update:
	//
	//	err := s.Update(func(tx zestor.ReadWriter[int]) error {
	//		n, _, err := tx.Get("counters", "visits")
	//		if err == nil {
	//			_, err = tx.Set("counters", "visits", n+1)
	//		}
	//		return err
	//	})
	SetFn(kind, key string, fn func(value T) (T, error)) (changed bool, err error)

	// SetMany stores all values or, with an error, none. Other keys stay, equal values are skipped,
	// and changes happen in key order. Without values it does nothing.
	SetMany(kind string, values map[string]T) error

	// SetIf stores a value if the entry is at the revision that the caller saw ([Entry].Revision;
	// 0: the key must not exist), and returns its new revision, or with an equal value the same.
	// Otherwise it returns 0 and [ErrConflict]: also for a key that was deleted and created again.
	SetIf(kind, key string, value T, revision int64) (newRevision int64, err error)

	// Delete removes a key and returns what it held: zero for an absent key, which is not an error,
	// and for a value that cannot be decoded.
	Delete(kind, key string) (existed bool, prev T, err error)
}

// ReadWriter is what an Update function works with.
type ReadWriter[T any] interface {
	Reader[T]
	Writer[T]
}

// Watcher reports changes.
type Watcher[T any] interface {
	// Watch sends the changes of a kind to the channel it returns, in revision order, each exactly
	// once, after its commit: those committed after the call, and with a replay option first the
	// past, then one [EventSynced]. Replay and live changes meet exactly.
	//
	// A watch holds a limited number of undelivered changes, see [WithBufferSize]. When one more is
	// committed it takes no more: it delivers what it holds, then an [EventError] with
	// [ErrWatchOverflow]. Watching again with [WithSince] of that event's Revision goes on exactly
	// there. If that is answered by [ErrCompacted], or the Revision is -1 since an initial replay
	// broke off, start over with an empty state and [WithInitialReplay]. In SQLite a watch also ends, with
	// ErrCompacted, if more is written than the file keeps before it is read, as by one large transaction,
	// see SQLiteOptions.HistoryBytes. Who hears little should watch again now and then, for a newer
	// EventSynced to go on from.
	//
	// The channel closes once: when ctx ends, after an EventError, or when the store closes; what
	// is then undelivered is dropped, but for up to 65 events that are in the channel or on their way.
	// Watch keeps ctx; if that has ended before, it returns ctx.Err(), not wrapped. For a moment after
	// an older state was restored into a watched file, it returns [ErrCompacted]: try again.
	Watch(ctx context.Context, kind string, opts ...WatchOption) (<-chan Event[T], error)
}

// Store is a key-value store of values of type T, the same whether in memory or in SQLite. Its
// methods may be called from any number of goroutines.
//
// Values are shared, not copied: one given to the store, or received from it, must not be modified.
type Store[T any] interface {
	ReadWriter[T]
	Watcher[T]

	// View calls fn with one snapshot, whatever is written meanwhile, and returns fn's error as it
	// is. fn must not call the store, nor wait for a watch, only call tx, on its own goroutine;
	// afterwards tx returns [ErrTxDone].
	View(fn func(tx Reader[T]) error) error

	// Update calls fn in a transaction over any keys and kinds, and commits if it returns nil. If
	// it returns an error, panics or calls runtime.Goexit, nothing of it remains, no event is sent,
	// and the error comes back as it is. A call that fails inside changes nothing, and fn may go on
	// and commit the rest; but after an error of SQLite itself Update fails whatever fn returns.
	//
	// tx reads its own writes. As in View, fn must not call the store, nor wait for a watch, and only
	// its own goroutine may use tx. No other change's event comes between those of one transaction.
	Update(fn func(tx ReadWriter[T]) error) error

	// Close waits for calls under way, ends every watch, and leaves no goroutine and no open file
	// behind. Calls that begin meanwhile may get [ErrClosed]. A Scan that [iter.Pull] holds is under
	// way until it is stopped, or the View that it is in has returned. Called again, Close returns
	// nil, after the first has finished. A callback or the body of a Scan must not call it. SQLite may
	// keep files open for as long as another store of the process has the same one open.
	Close() error
}

// Entry is a value with what the store knows about it.
type Entry[T any] struct {
	Kind, Key string
	Value     T
	Version   int64     // writes to this key since it was last created, from 1
	Revision  int64     // store-wide number of the change that wrote Value
	UpdatedAt time.Time // UTC, milliseconds; zero if the file holds no valid time
}

// Range selects keys for Scan. The zero Range selects all.
type Range struct {
	Prefix     string // only keys that start with it
	After      string // start strictly past this key, in the order of iteration: a page cursor
	Limit      int    // at most so many entries; 0: no limit; negative: an error
	Descending bool   // from the last key to the first
}

// SetResult says what a Set did.
type SetResult uint8

const (
	SetUnchanged SetResult = iota // the value was equal: nothing was written
	SetCreated                    // the key is new
	SetUpdated                    // the key has a new value
)

// String returns "unchanged", "created" or "updated".
func (r SetResult) String() string {
	return [...]string{"unchanged", "created", "updated"}[min(r, SetUpdated)]
}

// FilterFunc says whether List should keep an entry. It must not call the store.
type FilterFunc[T any] func(key string, value T) bool

// ValidateFunc says why a value must not be stored, or nil. It must not call the store.
type ValidateFunc[T any] func(value T) error

// CompareFunc says whether values are equal: then nothing is written. It must not call the store.
// In SQLite it has a price: old values are decoded, and concurrent Sets don't share a transaction.
type CompareFunc[T any] func(prev, next T) bool

// StoreOptions are the options of both stores. The zero value works. The store copies the map.
type StoreOptions[T any] struct {
	CompareFn   CompareFunc[T]             // nil: reflect.DeepEqual in memory, equal encodings in SQLite
	ValidateFns map[string]ValidateFunc[T] // kind -> check, run before anything is written; nil ones are skipped
}

// bounds returns the keys that r selects as lo <= key < hi; if hi is "", they have no end.
func (r Range) bounds() (lo, hi string) {
	lo = r.Prefix
	for n := len(lo); n > 0 && hi == ""; n-- {
		if last := lo[n-1]; last < 0xff { // a prefix "ab" ends before "ac", and "a\xff" before "b"
			hi = lo[:n-1] + string([]byte{last + 1})
		}
	}
	if r.After != "" && !r.Descending {
		lo = max(lo, r.After+"\x00")
	} else if r.After != "" && (hi == "" || r.After < hi) {
		hi = r.After
	}
	return lo, hi
}

// Below the contract: its rules, written once over the two engines. An engine's entries and events
// are of type V: T itself in memory, its encoding in SQLite.

// snapshot is one consistent state of an engine. scan and history end when each returns false.
type snapshot[V any] interface {
	// get returns an entry, with no Key if it is absent. Of an entry that is not asked for whole, get
	// and scan may leave out the version, revision and time.
	get(kind, key string, whole bool) Entry[V]
	// scan goes through a range of a kind, or all kinds if it is "".
	scan(kind string, r Range, whole bool, each func(Entry[V]) bool)
	keys(kind string) []string
	count(kind string) int
	revision() int64
	// history goes through all changes after since; ErrCompacted says that the next is missing.
	history(since int64, each func(*Event[V]) bool) error
	// failure is the first error of any method. Since then they do nothing; results mean nothing.
	failure() error
}

// transaction is a snapshot that can be changed. A write takes the next revision, a put a version.
type transaction[V any] interface {
	snapshot[V]
	put(kind, key string, value V)
	// putMany puts what differs, or returns false: the engine has no quicker way than put.
	putMany(entries []Entry[V]) bool
	remove(old Entry[V])
}

// engine is what differs between the stores. A failure of the snapshot comes before an error of fn.
type engine[V any] interface {
	// read lends fn a snapshot for one call on it, or, if it lasts, for any number.
	read(lasts bool, fn func(snapshot[V]) error) error
	// write commits if fn returns nil. A shared fn runs no callbacks: another caller's goroutine
	// may run it, in one transaction with others.
	write(shared bool, fn func(transaction[V]) error) error
	close()
}

// core is what a store and its transactions share.
type core[T, V any] struct {
	engine  engine[V]
	options StoreOptions[T]
	nilable bool                                       // a T can be a nil pointer
	encode  func(kind, key string, value T) (V, error) // runs the codec
	decode  func(V) (T, error)                         // runs the codec
	equal   func(prev, next V) bool                    // without CompareFn
	streams bool                                       // a read that lasts, as for a Scan, holds up nobody
	hub     *hub[T, V]
	open    sync.RWMutex // read-locked by each call; Close locks it for good
	closing sync.Once
	repeats atomic.Bool // the last Set changed nothing, so the next may not either
}

// store is a store over an engine, or what a View or Update sees of it.
type store[T, V any] struct {
	*core[T, V]
	tx     snapshot[V]    // nil: the store itself
	change transaction[V] // tx in Update, else nil
	done   atomic.Bool    // View or Update has returned
}

// View and Update hand out a struct that embeds their tx as a reader or writer, so that nobody can assert
// it to be a Store. The names are not exported, so that nobody can take the tx out of the struct.
type reader[T any] interface{ Reader[T] }
type writer[T any] interface{ ReadWriter[T] }

func newStore[T, V any](c *core[T, V]) *store[T, V] {
	c.options.ValidateFns = maps.Clone(c.options.ValidateFns)
	c.nilable = slices.Contains([]reflect.Kind{reflect.Pointer, reflect.Interface}, reflect.TypeFor[T]().Kind())
	return &store[T, V]{core: c}
}

func (st *store[T, V]) View(fn func(tx Reader[T]) error) error {
	var own error // fn's, which comes back as it is
	err := st.call(&place{"view"}, func() error {
		if fn == nil {
			return errNilFunc
		}
		return st.engine.read(true, func(s snapshot[V]) error {
			s.revision() // SQLite takes the snapshot at the first read
			tx := &store[T, V]{core: st.core, tx: s}
			defer tx.done.Store(true)
			own = fn(struct{ reader[T] }{tx})
			return own
		})
	})
	return cmp.Or(own, err)
}

func (st *store[T, V]) Update(fn func(tx ReadWriter[T]) error) error {
	var own error // fn's, which comes back as it is
	err := st.call(&place{"update"}, func() error {
		if fn == nil {
			return errNilFunc
		}
		return st.engine.write(false, func(t transaction[V]) error {
			tx := &store[T, V]{core: st.core, tx: t, change: t}
			defer tx.done.Store(true)
			own = fn(struct{ writer[T] }{tx})
			return own
		})
	})
	return cmp.Or(own, err)
}

func (st *store[T, V]) Close() error {
	st.closing.Do(func() {
		st.hub.end() // first, so that the body of a Scan that waits for a watch comes to its end
		st.open.Lock()
		st.hub.wait()
		st.engine.close()
	})
	return nil
}

// call is the frame of every method: it enters the store or transaction, checks the names in at, runs
// fn, and wraps the error in at, which fn may have changed to name the key that failed.
func (st *store[T, V]) call(at *place, fn func() error) error {
	switch {
	case st.done.Load():
		return at.fail(ErrTxDone)
	case st.tx == nil && !st.open.TryRLock(): // RLock would wait for Close, and Close for the Scan that this is in
		return at.fail(ErrClosed)
	case st.tx == nil:
		defer st.open.RUnlock()
	}
	err := at.check()
	if err == nil {
		err = fn()
	}
	if st.done.Load() { // a Scan, with iter.Pull, may outlive its View
		err = ErrTxDone
	}
	return at.fail(err)
}

// read runs fn in the transaction that st is, or in a snapshot of its own.
func (st *store[T, V]) read(lasts bool, fn func(snapshot[V])) error {
	if st.tx != nil {
		fn(st.tx)
		return st.tx.failure()
	}
	return st.engine.read(lasts, func(s snapshot[V]) error {
		fn(s)
		return nil
	})
}

// query is a method that reads once.
func query[T, V, R any](st *store[T, V], at place, fn func(snapshot[V]) R) (result R, err error) {
	err = st.call(&at, func() error {
		return st.read(false, func(s snapshot[V]) { result = fn(s) })
	})
	return result, err
}

func (st *store[T, V]) Get(kind, key string) (value T, ok bool, err error) {
	e, ok, err := st.entry("get", kind, key, false)
	return e.Value, ok && err == nil, err
}

func (st *store[T, V]) GetEntry(kind, key string) (Entry[T], bool, error) {
	return st.entry("getentry", kind, key, true)
}

func (st *store[T, V]) entry(op, kind, key string, whole bool) (e Entry[T], ok bool, err error) {
	err = st.call(&place{op, kind, key}, func() error {
		found, err := st.find(kind, key, whole)
		if ok = err == nil && found.Key != ""; ok {
			e, err = st.decodeEntry(found)
		}
		return err
	})
	return e, ok, err
}

func (st *store[T, V]) List(kind string, filters ...FilterFunc[T]) (list map[string]T, err error) {
	err = st.entries(place{"list", kind}, kind, false, func(entries []Entry[T]) {
		list = make(map[string]T, len(entries))
		for _, e := range entries {
			drops := func(keep FilterFunc[T]) bool { return keep != nil && !keep(e.Key, e.Value) }
			if !slices.ContainsFunc(filters, drops) {
				list[e.Key] = e.Value
			}
		}
	})
	return list, err
}

func (st *store[T, V]) Keys(kind string) ([]string, error) {
	return query(st, place{"keys", kind}, func(s snapshot[V]) []string { return s.keys(kind) })
}

func (st *store[T, V]) Values(kind string) (values []Entry[T], err error) {
	err = st.entries(place{"values", kind}, kind, true, func(entries []Entry[T]) { values = entries })
	return values, err
}

func (st *store[T, V]) Count(kind string) (int, error) {
	return query(st, place{"count", kind}, func(s snapshot[V]) int { return s.count(kind) })
}

func (st *store[T, V]) GetAll() (all map[string]map[string]T, err error) {
	err = st.entries(place{"getall"}, "", false, func(entries []Entry[T]) {
		all = make(map[string]map[string]T)
		for _, e := range entries {
			if all[e.Kind] == nil {
				all[e.Kind] = make(map[string]T)
			}
			all[e.Kind][e.Key] = e.Value
		}
	})
	return all, err
}

func (st *store[T, V]) Scan(kind string, r Range) iter.Seq2[Entry[T], error] {
	return func(yield func(Entry[T], error) bool) {
		stopped := false
		each := func(e Entry[V]) bool {
			entry, err := st.decodeEntry(e)
			stopped = !yield(entry, place{"scan", e.Kind, e.Key}.fail(err))
			return !stopped && !st.done.Load()
		}
		err := st.call(&place{"scan", kind}, func() error {
			switch {
			case r.Limit < 0:
				return fmt.Errorf("negative limit %d", r.Limit)
			case st.streams && st.change == nil:
				return st.read(true, func(s snapshot[V]) { s.scan(kind, r, true, each) })
			}
			rows, err := st.collect(kind, r, true)
			for i := 0; err == nil && i < len(rows) && each(rows[i]); i++ {
			}
			return err
		})
		if err != nil && !stopped {
			yield(Entry[T]{}, err)
		}
	}
}

func (st *store[T, V]) Revision() (int64, error) {
	return query(st, place{"revision"}, snapshot[V].revision)
}

func (st *store[T, V]) Set(kind, key string, value T) (SetResult, error) {
	result, _, err := st.set(place{"set", kind, key}, value, nil)
	return result, err
}

func (st *store[T, V]) SetIf(kind, key string, value T, revision int64) (int64, error) {
	_, newRevision, err := st.set(place{"setif", kind, key}, value, &revision)
	return newRevision, err
}

// set stores a value. For SetIf, want is the revision to be replaced, and the new one is returned.
func (st *store[T, V]) set(at place, value T, want *int64) (result SetResult, revision int64, err error) {
	kind, key := at[1], at[2]
	err = st.call(&at, func() error {
		v, err := st.check(at, value)
		if err != nil {
			return err
		}
		if st.tx == nil && want == nil && st.repeats.Load() {
			// This value may be equal too: look, without locking other writers out.
			old, err := st.find(kind, key, false)
			if err != nil || st.same(old, value, v) {
				return err
			}
		}
		return st.write(st.options.CompareFn == nil, func(t transaction[V]) error {
			old := t.get(kind, key, want != nil)
			result, revision = SetUpdated, old.Revision
			switch {
			case want != nil && *want != revision:
				return ErrConflict
			case st.same(old, value, v):
				result = SetUnchanged
				return nil
			case old.Key == "":
				result = SetCreated
			}
			t.put(kind, key, v)
			if want != nil {
				revision = t.get(kind, key, true).Revision
			}
			return nil
		})
	})
	if err != nil {
		return SetUnchanged, 0, err // also where the commit failed
	}
	st.repeats.Store(result == SetUnchanged)
	return result, revision, nil
}

func (st *store[T, V]) SetFn(kind, key string, fn func(value T) (T, error)) (changed bool, err error) {
	at := place{"setfn", kind, key}
	err = st.call(&at, func() error {
		if fn == nil {
			return errNilFunc
		}
		return st.write(false, func(t transaction[V]) error {
			old := t.get(kind, key, false)
			if old.Key == "" {
				return ErrKeyNotFound
			}
			var v V
			value, err := st.decode(old.Value)
			if err == nil {
				value, err = fn(value)
			}
			if err == nil {
				v, err = st.check(at, value)
			}
			if changed = err == nil && !st.same(old, value, v); changed {
				t.put(kind, key, v)
			}
			return err
		})
	})
	return changed && err == nil, err
}

func (st *store[T, V]) SetMany(kind string, values map[string]T) error {
	at := place{"setmany", kind}
	entries := make([]Entry[V], len(values))
	return st.call(&at, func() error {
		for i, key := range slices.Sorted(maps.Keys(values)) {
			v, err := st.check(place{"setmany", kind, key}, values[key])
			if err != nil {
				at = append(at, key)
				return err
			}
			entries[i] = Entry[V]{Kind: kind, Key: key, Value: v}
		}
		if len(entries) == 0 {
			return nil
		}
		return st.write(false, func(t transaction[V]) error {
			if st.options.CompareFn == nil && t.putMany(entries) {
				return nil
			}
			same := func(e Entry[V]) bool { return st.same(t.get(kind, e.Key, false), values[e.Key], e.Value) }
			for _, e := range slices.DeleteFunc(entries, same) { // before anything is written, since CompareFn may panic
				t.put(kind, e.Key, e.Value)
			}
			return nil
		})
	})
}

func (st *store[T, V]) Delete(kind, key string) (existed bool, prev T, err error) {
	err = st.call(&place{"delete", kind, key}, func() error {
		old, err := st.find(kind, key, true)
		if old.Key == "" {
			return err
		}
		prev, _ = st.decode(old.Value)
		// Decode before the write: a codec may panic, and a shared write must run none. If the key was
		// written meanwhile, the second try is not shared, and decodes what it removes.
		for shared, raced := true, true; raced && err == nil; shared = false {
			err = st.write(shared, func(t transaction[V]) error {
				now := t.get(kind, key, true)
				existed = now.Key != ""
				if raced = shared && now.Revision != old.Revision; raced || !existed {
					return nil
				}
				if !shared {
					prev, _ = st.decode(now.Value)
				}
				t.remove(now)
				return nil
			})
		}
		return err
	})
	if err != nil || !existed {
		return false, *new(T), err
	}
	return true, prev, nil
}

// write runs fn in the Update that st is, or in a transaction of its own.
func (st *store[T, V]) write(shared bool, fn func(transaction[V]) error) error {
	if st.change != nil {
		err := fn(st.change)
		return cmp.Or(st.tx.failure(), err)
	}
	return st.engine.write(shared, fn)
}

// check encodes a value if it and its key may be stored.
func (c *core[T, V]) check(at place, value T) (v V, err error) {
	err = at.check()
	if err == nil && c.nilable && reflect.ValueOf(value).Kind() == reflect.Pointer && reflect.ValueOf(value).IsNil() {
		err = errors.New("value is a nil pointer")
	}
	if validate := c.options.ValidateFns[at[1]]; err == nil && validate != nil {
		err = validate(value)
	}
	if err == nil {
		v, err = c.encode(at[1], at[2], value)
	}
	return v, err
}

// same says that an entry is there, and equal to what is to be stored.
func (c *core[T, V]) same(old Entry[V], next T, encoded V) bool {
	if old.Key == "" || c.options.CompareFn == nil {
		return old.Key != "" && c.equal(old.Value, encoded)
	}
	prev, err := c.decode(old.Value)
	return err == nil && c.options.CompareFn(prev, next)
}

// decodeEntry decodes a row. With an error it is the entry without its value.
func (c *core[T, V]) decodeEntry(r Entry[V]) (Entry[T], error) {
	value, err := c.decode(r.Value)
	return Entry[T]{r.Kind, r.Key, value, r.Version, r.Revision, r.UpdatedAt}, err
}

// entries collects a kind, or all if it is "", and decodes when the snapshot has been given back.
func (st *store[T, V]) entries(at place, kind string, whole bool, use func([]Entry[T])) error {
	return st.call(&at, func() error {
		rows, err := st.collect(kind, Range{}, whole)
		entries := make([]Entry[T], len(rows))
		for i := 0; i < len(rows) && err == nil; i++ {
			if entries[i], err = st.decodeEntry(rows[i]); err != nil {
				at = place{at[0], rows[i].Kind, rows[i].Key}
			}
		}
		if err == nil {
			use(entries)
		}
		return err
	})
}

func (st *store[T, V]) find(kind, key string, whole bool) (e Entry[V], err error) {
	err = st.read(false, func(s snapshot[V]) { e = s.get(kind, key, whole) })
	return e, err
}

func (st *store[T, V]) collect(kind string, r Range, whole bool) (rows []Entry[V], err error) {
	each := func(e Entry[V]) bool {
		rows = append(rows, e)
		return true
	}
	err = st.read(false, func(s snapshot[V]) { s.scan(kind, r, whole, each) })
	return rows, err
}

// maxSize is how many bytes SQLite takes of kind, key and value together: sqlite.org/limits.html, item 1.
const maxSize = 1_000_000_000 - 1024 // with room for the rest of a row

var errNilFunc = errors.New("function is nil")

// A place is where an error happens: an operation, and then the kind and the key, if it has them.
type place []string

func (p place) check() error {
	size := 0
	for i, name := range p[1:] {
		if size += len(name); name == "" {
			return [...]error{ErrKindRequired, ErrKeyRequired}[i]
		}
	}
	if size > maxSize {
		return errors.New("kind and key are too long")
	}
	return nil
}

// fail wraps an error once.
func (p place) fail(err error) error {
	if err == nil {
		return nil
	}
	text := "zestor: " + p[0]
	for i, name := range p[1:] {
		quoted := fmt.Sprintf("%.500q", name)         // no line breaks, not endless
		text += " /"[i:i+1] + quoted[1:len(quoted)-1] // a space before the kind, a slash before the key
	}
	return &placedError{text, err}
}

// A placedError asks for its cause's text only when it is read: a callback's error may panic there.
type placedError struct {
	where string
	cause error
}

func (e *placedError) Unwrap() error { return e.cause }
func (e *placedError) Error() string {
	return e.where + ": " + strings.TrimPrefix(e.cause.Error(), "zestor: ")
}
