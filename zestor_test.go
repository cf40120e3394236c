package zestor_test

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"iter"
	"maps"
	"math"
	mathrand "math/rand"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"
	"weak"

	_ "github.com/mattn/go-sqlite3"
	"github.com/zestor-dev/zestor"
)

// The stores table drives every test of what the stores have in common.

type user struct {
	Name, Email, City string
	Age               int
}

var kinds = []string{"memory", "sqlite", "sqlite-private", "sqlite-rollback"}

// open makes an empty store of a kind, which ends with the test.
func open[T any](t testing.TB, kind string, opts zestor.StoreOptions[T]) zestor.Store[T] {
	t.Helper()
	if kind == "memory" {
		s := zestor.NewMemStore(opts)
		t.Cleanup(func() { check(t, s.Close()) })
		return s
	}
	o := zestor.SQLiteOptions[T]{StoreOptions: opts, DSN: ":memory:", DisableWAL: kind == "sqlite-rollback"}
	if kind != "sqlite-private" {
		o.DSN = filepath.Join(t.TempDir(), "test.db")
	}
	return openSQLite(t, o)
}

func openSQLite[T any](t testing.TB, o zestor.SQLiteOptions[T]) zestor.Store[T] {
	t.Helper()
	s, err := zestor.NewSQLiteStore(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, s.Close()) })
	return s
}

// each runs f on every kind of store.
func each[T any](t *testing.T, f func(t *testing.T, s zestor.Store[T])) {
	t.Helper()
	eachWith(t, zestor.StoreOptions[T]{}, f)
}

func eachWith[T any](t *testing.T, opts zestor.StoreOptions[T], f func(t *testing.T, s zestor.Store[T])) {
	t.Helper()
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) { f(t, open(t, kind, opts)) })
	}
}

// eachBubble runs f on every kind of store in a synctest bubble, where
// synctest.Wait returns when every goroutine of the store sleeps.
func eachBubble[T any](t *testing.T, f func(t *testing.T, s zestor.Store[T])) {
	t.Helper()
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { f(t, open(t, kind, zestor.StoreOptions[T]{})) })
		})
	}
}

// check fails the test for an error.
func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// long says that the long versions of the tests are wanted.
var long = os.Getenv("ZESTOR_LONG") != ""

// missing skips a test whose tool the machine lacks; in CI that fails.
func missing(t testing.TB, tool string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("%s is missing", tool)
	}
	t.Skipf("%s is missing", tool)
}

// Other processes are this test binary, started again as a child.

var children = map[string]func(args []string){}

// child registers what a child process does.
func child(name string, run func(args []string)) bool {
	children[name] = run
	return true
}

func TestMain(m *testing.M) {
	if name := os.Getenv("ZESTOR_CHILD"); name != "" {
		children[name](os.Args[1:])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// process is a running child: lines it prints can be read from out, and it
// reads what is written to in.
type process struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

// start runs a child. It is killed when the test ends, or when it takes too long.
func start(t testing.TB, name string, args ...string) *process {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "ZESTOR_CHILD="+name)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	timer := time.AfterFunc(fileDeadline, func() { cmd.Process.Kill() })
	t.Cleanup(func() {
		timer.Stop()
		cmd.Process.Kill()
		cmd.Wait()
	})
	p := &process{cmd, in, bufio.NewScanner(out)}
	p.out.Buffer(nil, 1<<20)
	return p
}

// line returns the next line that the child prints.
func (p *process) line(t testing.TB) string {
	t.Helper()
	if !p.out.Scan() {
		t.Fatalf("child ended: %v", p.out.Err())
	}
	return p.out.Text()
}

// must is for children and examples, which have no test to fail.
func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Section 3 of the contract: behaviour, the same in both stores.

// rwT makes one list of what a call returns, rwErr takes its error.
func rwT(values ...any) []any { return values }

func rwErr(values ...any) error {
	err, _ := values[len(values)-1].(error)
	return err
}

// rwEq compares a list of results with what is wanted.
func rwEq(t testing.TB, got []any, want ...any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %.300v, want %.300v", fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", want))
	}
}

// rwIs checks what an error wraps, and that it begins as all do.
func rwIs(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || !strings.HasPrefix(err.Error(), "zestor: ") {
		t.Errorf("got error %.300v, want a zestor: error that is %v", err, want)
	}
}

// rwOpen is open with a codec, which the memory store has no use for, and
// without waiting for the disk.
func rwOpen[T any](t testing.TB, kind string, opts zestor.StoreOptions[T], codec zestor.Codec) zestor.Store[T] {
	t.Helper()
	if kind == "memory" {
		return open(t, kind, opts)
	}
	o := zestor.SQLiteOptions[T]{StoreOptions: opts, DSN: ":memory:", Codec: codec, DisableWAL: kind == "sqlite-rollback"}
	if kind != "sqlite-private" {
		o.DSN = "file:" + t.TempDir() + "/test.db?_synchronous=OFF"
	}
	return openSQLite(t, o)
}

// rwEach runs f on every kind of store, under a name.
func rwEach[T any](t *testing.T, name string, f func(t *testing.T, s zestor.Store[T])) {
	t.Helper()
	rwEachWith(t, name, zestor.StoreOptions[T]{}, nil, f)
}

func rwEachWith[T any](t *testing.T, name string, opts zestor.StoreOptions[T], codec zestor.Codec, f func(t *testing.T, s zestor.Store[T])) {
	t.Helper()
	for _, kind := range kinds {
		t.Run(name+"/"+kind, func(t *testing.T) { f(t, rwOpen(t, kind, opts, codec)) })
	}
}

// rwView and rwUpdate run f in a transaction, and rwReaders on a store and its
// transactions.
func rwView[T any](t testing.TB, s zestor.Store[T], f func(tx zestor.Reader[T])) {
	t.Helper()
	check(t, s.View(func(tx zestor.Reader[T]) error { f(tx); return nil }))
}

func rwUpdate[T any](t testing.TB, s zestor.Store[T], f func(tx zestor.ReadWriter[T])) {
	t.Helper()
	check(t, s.Update(func(tx zestor.ReadWriter[T]) error { f(tx); return nil }))
}

func rwReaders[T any](t *testing.T, s zestor.Store[T], f func(t *testing.T, r zestor.Reader[T])) {
	t.Helper()
	t.Run("store", func(t *testing.T) { f(t, s) })
	t.Run("View", func(t *testing.T) { rwView(t, s, func(tx zestor.Reader[T]) { f(t, tx) }) })
	t.Run("Update", func(t *testing.T) { rwUpdate(t, s, func(tx zestor.ReadWriter[T]) { f(t, tx) }) })
}

// rwWriters runs f on every kind of store, directly and in an Update.
func rwWriters[T any](t *testing.T, name string, opts zestor.StoreOptions[T], codec zestor.Codec, f func(t *testing.T, rw zestor.ReadWriter[T])) {
	t.Helper()
	rwEachWith(t, name, opts, codec, func(t *testing.T, s zestor.Store[T]) { f(t, s) })
	rwEachWith(t, name+"/Update", opts, codec, func(t *testing.T, s zestor.Store[T]) {
		rwUpdate(t, s, func(tx zestor.ReadWriter[T]) { f(t, tx) })
	})
}

// rwEnd runs f on a goroutine of its own and says how it ended: with "return",
// "goexit" or the value of a panic.
func rwEnd(f func()) (how any) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		how = "goexit"
		defer func() {
			if p := recover(); p != nil {
				how = p
			}
		}()
		f()
		how = "return"
	}()
	<-done
	return how
}

// rwScan returns what a scan yields, as key=value.
func rwScan[T any](t testing.TB, r zestor.Reader[T], kind string, rg zestor.Range) []string {
	t.Helper()
	got := []string{}
	for e, err := range r.Scan(kind, rg) {
		check(t, err)
		got = append(got, fmt.Sprintf("%s=%v", e.Key, e.Value))
	}
	return got
}

// rwState is everything in a store that can be seen.
func rwState[T any](r zestor.Reader[T]) (state []any) {
	for _, kind := range []string{"k", "l", "m"} {
		state = append(state, rwT(r.Values(kind)), rwT(r.Keys(kind)), rwT(r.Count(kind)))
	}
	return append(state, rwT(r.GetAll()), rwT(r.Revision()))
}

// rwEntry is GetEntry without the time.
func rwEntry[T any](t testing.TB, r zestor.Reader[T], kind, key string) zestor.Entry[T] {
	t.Helper()
	e, ok, err := r.GetEntry(kind, key)
	check(t, err)
	if !ok {
		t.Errorf("no entry %s/%s", kind, key)
	}
	e.UpdatedAt = time.Time{}
	return e
}

// rwCall is a method of a store: how many of kind and key it takes.
type rwCall struct {
	op    string
	names int
	do    func(kind, key string) error
}

func rwReads(r zestor.Reader[string]) []rwCall {
	return []rwCall{
		{"Get", 2, func(kind, key string) error { return rwErr(r.Get(kind, key)) }},
		{"GetEntry", 2, func(kind, key string) error { return rwErr(r.GetEntry(kind, key)) }},
		{"List", 1, func(kind, _ string) error { return rwErr(r.List(kind)) }},
		{"Keys", 1, func(kind, _ string) error { return rwErr(r.Keys(kind)) }},
		{"Values", 1, func(kind, _ string) error { return rwErr(r.Values(kind)) }},
		{"Count", 1, func(kind, _ string) error { return rwErr(r.Count(kind)) }},
		{"GetAll", 0, func(_, _ string) error { return rwErr(r.GetAll()) }},
		{"Scan", 1, func(kind, _ string) error { return rwLast(r.Scan(kind, zestor.Range{})) }},
		{"Revision", 0, func(_, _ string) error { return rwErr(r.Revision()) }},
	}
}

// rwLast is the error that a scan ends with.
func rwLast[T any](seq iter.Seq2[zestor.Entry[T], error]) (last error) {
	for _, err := range seq {
		last = err
	}
	return last
}

func rwWrites(w zestor.Writer[string]) []rwCall {
	return []rwCall{
		{"Set", 2, func(kind, key string) error { return rwErr(w.Set(kind, key, "v")) }},
		{"SetFn", 2, func(kind, key string) error {
			return rwErr(w.SetFn(kind, key, func(string) (string, error) { return "v", nil }))
		}},
		{"SetMany", 2, func(kind, key string) error { return w.SetMany(kind, map[string]string{"b": "v", key: "v"}) }},
		{"SetIf", 2, func(kind, key string) error { return rwErr(w.SetIf(kind, key, "v", 7)) }},
		{"Delete", 2, func(kind, key string) error { return rwErr(w.Delete(kind, key)) }},
	}
}

func TestReads(t *testing.T) {
	rwEach(t, "an absent key is not ok, an absent kind is empty and not nil", func(t *testing.T, s zestor.Store[string]) {
		rwEq(t, rwT(s.GetAll()), map[string]map[string]string{}, nil)
		rwEq(t, rwT(s.Revision()), int64(0), nil)
		rwEq(t, rwT(s.Set("other", "x", "1")), zestor.SetCreated, nil)
		rwEq(t, rwT(s.Set("emptied", "x", "1")), zestor.SetCreated, nil)
		rwEq(t, rwT(s.Delete("emptied", "x")), true, "1", nil)
		rwReaders(t, s, func(t *testing.T, r zestor.Reader[string]) {
			for _, kind := range []string{"absent", "emptied", "other"} {
				rwEq(t, rwT(r.Get(kind, "absent")), "", false, nil)
				rwEq(t, rwT(r.GetEntry(kind, "absent")), zestor.Entry[string]{}, false, nil)
			}
			for _, kind := range []string{"absent", "emptied"} {
				rwEq(t, rwT(r.List(kind)), map[string]string{}, nil)
				rwEq(t, rwT(r.Keys(kind)), []string{}, nil)
				rwEq(t, rwT(r.Values(kind)), []zestor.Entry[string]{}, nil)
				rwEq(t, rwT(r.Count(kind)), 0, nil)
				rwEq(t, rwT(rwScan(t, r, kind, zestor.Range{})), []string{})
			}
			rwEq(t, rwT(r.GetAll()), map[string]map[string]string{"other": {"x": "1"}}, nil)
		})
	})
	rwEach(t, "every read tells the same", func(t *testing.T, s zestor.Store[string]) {
		before := time.Now().Truncate(time.Millisecond)
		want := map[string]string{"\x00": "1", "B": "2", "a": "3", "a\x00": "4", "aa": "5", "é": "6", "\xff": "7"}
		check(t, s.SetMany("k", want))
		check(t, s.SetMany("l", map[string]string{"x": "8"}))
		after := time.Now()
		sorted := slices.Sorted(maps.Keys(want))
		rwReaders(t, s, func(t *testing.T, r zestor.Reader[string]) {
			rwEq(t, rwT(r.Keys("k")), sorted, nil)
			rwEq(t, rwT(r.List("k")), want, nil)
			rwEq(t, rwT(r.Count("k")), len(want), nil)
			rwEq(t, rwT(r.Revision()), int64(len(want)+1), nil)
			rwEq(t, rwT(r.GetAll()), map[string]map[string]string{"k": want, "l": {"x": "8"}}, nil)
			values, err := r.Values("k")
			check(t, err)
			var scanned []zestor.Entry[string]
			for e, err := range r.Scan("k", zestor.Range{}) {
				check(t, err)
				scanned = append(scanned, e)
			}
			rwEq(t, rwT(scanned), values)
			for i, key := range sorted {
				rwEq(t, rwT(r.Get("k", key)), want[key], true, nil)
				rwEq(t, rwT(r.GetEntry("k", key)), values[i], true, nil)
				at := values[i].UpdatedAt
				if at.Location() != time.UTC || at != at.Truncate(time.Millisecond) || at.Before(before) || at.After(after) {
					t.Errorf("UpdatedAt %v is not UTC, in milliseconds, from %v to %v", at, before, after)
				}
				rwEq(t, rwT(rwEntry(t, r, "k", key)), zestor.Entry[string]{Kind: "k", Key: key, Value: want[key], Version: 1, Revision: int64(i + 1)})
			}
		})
	})
	rwEach(t, "filters are ANDed and nil ones skipped", func(t *testing.T, s zestor.Store[int]) {
		check(t, s.SetMany("k", map[string]int{"a": 1, "b": 2, "c": 3, "d": 4}))
		even := func(_ string, v int) bool { return v%2 == 0 }
		past := func(key string, _ int) bool { return key > "b" }
		rwReaders(t, s, func(t *testing.T, r zestor.Reader[int]) {
			rwEq(t, rwT(r.List("k", nil, even, nil, past)), map[string]int{"d": 4}, nil)
			rwEq(t, rwT(r.List("k", past)), map[string]int{"c": 3, "d": 4}, nil)
			rwEq(t, rwT(r.List("k", nil)), map[string]int{"a": 1, "b": 2, "c": 3, "d": 4}, nil)
			rwEq(t, rwT(r.List("k", even, func(string, int) bool { return false })), map[string]int{}, nil)
			m, err := r.List("k") // the map is the caller's
			check(t, err)
			clear(m)
			all, err := r.GetAll()
			check(t, err)
			clear(all["k"])
			rwEq(t, rwT(r.Count("k")), 4, nil)
			rwEq(t, rwT(r.Get("k", "a")), 1, true, nil)
		})
	})
}

// rwRange is what a Scan should yield of keys.
func rwRange(keys []string, r zestor.Range) []string {
	keys = slices.Sorted(slices.Values(keys))
	if r.Descending {
		slices.Reverse(keys)
	}
	got := []string{}
	for _, key := range keys {
		past := r.After == "" || r.Descending && key < r.After || !r.Descending && key > r.After
		if past && strings.HasPrefix(key, r.Prefix) && (r.Limit == 0 || len(got) < r.Limit) {
			got = append(got, key)
		}
	}
	return got
}

func TestScan(t *testing.T) {
	rwEach(t, "a range selects as a sorted slice would", func(t *testing.T, s zestor.Store[int]) {
		keys := []string{"\x00", "a", "a\x00", "a%", "a\xff", "a\xff\xff", "a\xff\xff\x00", "b", "\xff", "\xff\xff", "\xff\xffa"}
		values := map[string]int{}
		for i, key := range keys {
			values[key] = i
		}
		check(t, s.SetMany("k", values))
		for _, kind := range []string{"j", "k\x00", "l"} { // neighbours that must not be seen
			check(t, s.SetMany(kind, map[string]int{"a": -1, "ac": -1, "\xff\xff\xff": -1}))
		}
		bounds := append([]string{"", "a\xff\xff\xff", "\xff\xff\xff", "zz"}, keys...)
		rwReaders(t, s, func(t *testing.T, r zestor.Reader[int]) {
			for i := range len(bounds) * len(bounds) * 8 {
				rg := zestor.Range{Prefix: bounds[i/8%len(bounds)], After: bounds[i/8/len(bounds)], Limit: []int{0, 1, 3, 1000}[i%4], Descending: i%8 < 4}
				want := rwRange(keys, rg)
				for i, key := range want {
					want[i] = fmt.Sprintf("%s=%d", key, values[key])
				}
				if got := rwScan(t, r, "k", rg); !slices.Equal(got, want) {
					t.Fatalf("%+v: got %q, want %q", rg, got, want)
				}
			}
			n := 0
			for e, err := range r.Scan("k", zestor.Range{Limit: -1}) {
				if n++; n > 1 || err == nil || e != (zestor.Entry[int]{}) {
					t.Errorf("negative Limit: %v %v", e, err)
				}
			}
			rwEq(t, rwT(n), 1)
		})
	})
	rwEach(t, "the snapshot is taken when the range starts, and again", func(t *testing.T, s zestor.Store[string]) {
		seq := s.Scan("k", zestor.Range{})
		scan := func() (got []string) {
			for e, err := range seq {
				check(t, err)
				got = append(got, e.Key)
				s.Set("k", e.Key+"x", "")
			}
			return got
		}
		rwEq(t, rwT(s.Set("k", "a", "")), zestor.SetCreated, nil)
		rwEq(t, rwT(scan()), []string{"a"})
		rwEq(t, rwT(scan()), []string{"a", "ax"})
		rwEq(t, rwT(s.Delete("k", "a")), true, "", nil)
		rwEq(t, rwT(scan()), []string{"ax", "axx"})
	})
	// Each level adds a key and goes one deeper at its first entry. The
	// deepest changes everything, and every level goes on with what it saw.
	nested := func(t *testing.T, r zestor.Reader[string], w zestor.Writer[string], deepest func()) {
		want := []string{"a=1", "b=2"}
		var nest func(depth int)
		nest = func(depth int) {
			var got []string
			for e, err := range r.Scan("k", zestor.Range{}) {
				check(t, err)
				if got = append(got, e.Key+"="+e.Value); len(got) > 1 {
					continue
				}
				if depth == 20 {
					deepest()
					continue
				}
				if w != nil {
					key := fmt.Sprintf("n%02d", depth)
					rwEq(t, rwT(w.Set("k", key, "")), zestor.SetCreated, nil)
					want = append(want, key+"=")
				}
				rwEq(t, rwT(r.Get("k", "b")), "2", true, nil)
				nest(depth + 1)
			}
			if w == nil {
				rwEq(t, rwT(got), want)
			} else {
				rwEq(t, rwT(got), want[:1+depth])
			}
		}
		nest(1)
	}
	rwEach(t, "the body may call the store and nest scans to any depth", func(t *testing.T, s zestor.Store[string]) {
		check(t, s.SetMany("k", map[string]string{"a": "1", "b": "2"}))
		nested(t, s, s, func() {
			rwEq(t, rwT(s.SetFn("k", "a", func(v string) (string, error) { return v + "!", nil })), true, nil)
			rwEq(t, rwT(s.Delete("k", "b")), true, "2", nil)
			check(t, s.SetMany("k", map[string]string{"c": "", "n01": "!"}))
			rwUpdate(t, s, func(tx zestor.ReadWriter[string]) { check(t, rwErr(tx.SetIf("k", "z", "z", 0))) })
			rwView(t, s, func(tx zestor.Reader[string]) { rwEq(t, rwT(tx.Get("k", "a")), "1!", true, nil) })
			for _, c := range rwReads(s) {
				check(t, c.do("k", "a"))
			}
		})
		rwEq(t, rwT(s.Count("k")), 22, nil)
	})
	rwEach(t, "the body may do so in View and Update", func(t *testing.T, s zestor.Store[string]) {
		check(t, s.SetMany("k", map[string]string{"a": "1", "b": "2"}))
		rwView(t, s, func(tx zestor.Reader[string]) { nested(t, tx, nil, func() { check(t, rwReads(tx)[7].do("k", "")) }) })
		rwUpdate(t, s, func(tx zestor.ReadWriter[string]) {
			nested(t, tx, tx, func() {
				rwEq(t, rwT(tx.Set("k", "a", "1!")), zestor.SetUpdated, nil)
				rwEq(t, rwT(tx.Delete("k", "b")), true, "2", nil)
			})
		})
		rwEq(t, rwT(s.Count("k")), 20, nil)
	})
	rwEach(t, "leaving the loop in any way gives everything back", func(t *testing.T, s zestor.Store[int]) {
		check(t, s.SetMany("k", map[string]int{"a": 1, "b": 2, "c": 3}))
		leave := func(r zestor.Reader[int], how string) {
			seq := r.Scan("k", zestor.Range{})
			if how == "iter.Pull" {
				next, stop := iter.Pull2(seq)
				defer stop()
				e, err, ok := next()
				rwEq(t, rwT(e.Value, err, ok), 1, nil, true)
				return
			}
			for range seq {
				switch how {
				case "return":
					return
				case "boom":
					panic(how)
				case "goexit":
					runtime.Goexit()
				}
			}
		}
		var nest func(depth int)
		nest = func(depth int) {
			for range s.Scan("k", zestor.Range{Limit: 1}) {
				if depth > 1 {
					nest(depth - 1)
				}
			}
		}
		open := 0
		for round := range 15 {
			nest(20)
			for _, how := range []string{"return", "boom", "goexit", "iter.Pull"} {
				end := rwEnd(func() {
					for range s.Scan("k", zestor.Range{Limit: 2}) { // leaves two at once
						leave(s, how)
					}
				})
				rwEq(t, rwT(end == how || how == "iter.Pull" && end == "return"), true)
				if how == "return" || how == "iter.Pull" {
					rwView(t, s, func(tx zestor.Reader[int]) { leave(tx, how); rwEq(t, rwT(tx.Count("k")), 3, nil) })
					rwUpdate(t, s, func(tx zestor.ReadWriter[int]) { leave(tx, how); tx.Set("l", how, round) })
				}
			}
			if n := rwFiles(t); round < 3 {
				open = max(open, n)
			} else if n > open {
				t.Fatalf("round %d: %d open files, %d before", round, n, open)
			}
		}
		rwEq(t, rwT(s.List("l")), map[string]int{"return": 14, "iter.Pull": 14}, nil)
		check(t, s.Close())
	})
}

// rwFiles counts the open files of the process.
func rwFiles(t testing.TB) int {
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		missing(t, "/proc/self/fd")
	}
	return len(files)
}

func TestWrites(t *testing.T) {
	rwWriters(t, "Set creates, updates and leaves an equal value", zestor.StoreOptions[user]{}, nil, func(t *testing.T, rw zestor.ReadWriter[user]) {
		rwEq(t, rwT(rw.Set("k", "zero", user{})), zestor.SetCreated, nil)
		rwEq(t, rwT(rw.Get("k", "zero")), user{}, true, nil)
		rwEq(t, rwT(rw.Set("k", "zero", user{})), zestor.SetUnchanged, nil)
		before, _, _ := rw.GetEntry("k", "zero")
		rwEq(t, rwT(rw.Set("k", "a", user{Name: "A"})), zestor.SetCreated, nil)
		rwEq(t, rwT(rw.Set("k", "a", user{Name: "A"})), zestor.SetUnchanged, nil)
		rwEq(t, rwT(rw.Set("k", "a", user{Name: "A", Age: 1})), zestor.SetUpdated, nil)
		rwEq(t, rwT(rwEntry(t, rw, "k", "a")), zestor.Entry[user]{Kind: "k", Key: "a", Value: user{Name: "A", Age: 1}, Version: 2, Revision: 3})
		rwEq(t, rwT(rw.GetEntry("k", "zero")), before, true, nil)
		rwEq(t, rwT(rw.Revision()), int64(3), nil)
	})
	rwWriters(t, "SetFn", zestor.StoreOptions[int]{}, nil, func(t *testing.T, rw zestor.ReadWriter[int]) {
		cause := errors.New("cause")
		changed, err := rw.SetFn("k", "n", func(int) (int, error) { t.Error("fn of an absent key was called"); return 0, nil })
		rwEq(t, rwT(changed), false)
		rwIs(t, err, zestor.ErrKeyNotFound)
		rwEq(t, rwT(rw.Set("k", "n", 1)), zestor.SetCreated, nil)
		rwEq(t, rwT(rw.SetFn("k", "n", func(v int) (int, error) { return v + 1, nil })), true, nil)
		rwEq(t, rwT(rw.SetFn("k", "n", func(v int) (int, error) { return v, nil })), false, nil)
		changed, err = rw.SetFn("k", "n", func(v int) (int, error) { return 9, cause })
		rwEq(t, rwT(changed), false)
		rwIs(t, err, cause)
		rwEq(t, rwT(rwEntry(t, rw, "k", "n")), zestor.Entry[int]{Kind: "k", Key: "n", Value: 2, Version: 2, Revision: 2})
	})
	rwWriters(t, "SetMany merges, in key order, and skips equal values", zestor.StoreOptions[string]{}, nil, func(t *testing.T, rw zestor.ReadWriter[string]) {
		check(t, rw.SetMany("k", nil))
		check(t, rw.SetMany("k", map[string]string{}))
		rwEq(t, rwT(rw.Revision()), int64(0), nil)
		check(t, rw.SetMany("k", map[string]string{"m": "1", "b": "1", "é": "1", "a": "1"}))
		check(t, rw.SetMany("k", map[string]string{"z": "2", "m": "1", "b": "2", "c": "2"}))
		var got []string
		for e, err := range rw.Scan("k", zestor.Range{}) {
			check(t, err)
			got = append(got, fmt.Sprint(e.Key, e.Value, " ", e.Version, e.Revision))
		}
		rwEq(t, rwT(got), []string{"a1 1 1", "b2 2 5", "c2 1 6", "m1 1 3", "z2 1 7", "é1 1 4"})
	})
	refused := errors.New("refused")
	opts := zestor.StoreOptions[string]{ValidateFns: map[string]zestor.ValidateFunc[string]{"nil": nil, "k": func(v string) error {
		if v == "bad" {
			return refused
		}
		return nil
	}}}
	rwEach(t, "SetMany of any size skips equal values and numbers the others", func(t *testing.T, s zestor.Store[int]) {
		rng := rand.New(rand.NewPCG(1, 2))
		events := watchOn(t, s, "k")
		model := make(map[string]zestor.Entry[int])
		revision := int64(0)
		for _, size := range []int{1, 2, 31, 32, 33, 63, 64, 65, 100, 1000} {
			for range 5 {
				values := make(map[string]int)
				for range size {
					values[fmt.Sprint(rng.IntN(2*size))] = rng.IntN(3)
				}
				set := func(w zestor.Writer[int]) error { return w.SetMany("k", values) }
				if size%2 == 0 {
					check(t, s.Update(func(tx zestor.ReadWriter[int]) error { return set(tx) }))
				} else {
					check(t, set(s))
				}
				for _, key := range slices.Sorted(maps.Keys(values)) {
					e, ok := model[key]
					if ok && e.Value == values[key] {
						continue
					}
					revision++
					e = zestor.Entry[int]{Kind: "k", Key: key, Value: values[key], Version: e.Version + 1, Revision: revision}
					model[key] = e
					what := zestor.EventUpdate
					if !ok {
						what = zestor.EventCreate
					}
					rwEq(t, rwT(<-events), zestor.Event[int]{Type: what, Kind: "k", Key: key, Value: e.Value, Version: e.Version, Revision: revision})
				}
			}
		}
		rwEq(t, rwT(s.Revision()), revision, nil)
		got, err := s.Values("k")
		check(t, err)
		for i, key := range slices.Sorted(maps.Keys(model)) {
			if since := time.Since(got[i].UpdatedAt); since < -time.Second || since > time.Minute {
				t.Fatal(got[i])
			}
			got[i].UpdatedAt = time.Time{}
			rwEq(t, rwT(got[i]), model[key])
		}
		rwEq(t, rwT(len(got)), len(model))
	})

	rwWriters(t, "SetMany checks everything before it writes anything", opts, nil, func(t *testing.T, rw zestor.ReadWriter[string]) {
		rwIs(t, rw.SetMany("k", map[string]string{"a": "1", "b": "bad", "c": "3"}), refused)
		rwIs(t, rw.SetMany("k", map[string]string{"a": "1", "": "2", "c": "3"}), zestor.ErrKeyRequired)
		rwEq(t, rwT(rw.GetAll()), map[string]map[string]string{}, nil)
		rwEq(t, rwT(rw.Revision()), int64(0), nil)
		check(t, rw.SetMany("other", map[string]string{"a": "bad"})) // the check is of one kind
		check(t, rw.SetMany("nil", map[string]string{"a": "bad"}))
	})
	rwWriters(t, "every write validates", opts, nil, func(t *testing.T, rw zestor.ReadWriter[string]) {
		rwEq(t, rwT(rw.Set("k", "a", "good")), zestor.SetCreated, nil)
		rwIs(t, rwErr(rw.Set("k", "a", "bad")), refused)
		rwIs(t, rwErr(rw.Set("k", "b", "bad")), refused)
		rwIs(t, rwErr(rw.SetFn("k", "a", func(string) (string, error) { return "bad", nil })), refused)
		revision, err := rw.SetIf("k", "a", "bad", 1)
		rwEq(t, rwT(revision), int64(0))
		rwIs(t, err, refused)
		rwEq(t, rwT(rwEntry(t, rw, "k", "a")), zestor.Entry[string]{Kind: "k", Key: "a", Value: "good", Version: 1, Revision: 1})
		rwEq(t, rwT(rw.Count("k")), 1, nil)
	})
	rwWriters(t, "Delete", zestor.StoreOptions[int]{}, nil, func(t *testing.T, rw zestor.ReadWriter[int]) {
		rwEq(t, rwT(rw.Delete("k", "a")), false, 0, nil)
		rwEq(t, rwT(rw.Revision()), int64(0), nil)
		rwEq(t, rwT(rw.Set("k", "a", 5)), zestor.SetCreated, nil)
		rwEq(t, rwT(rw.Delete("k", "a")), true, 5, nil)
		rwEq(t, rwT(rw.Delete("k", "a")), false, 0, nil)
		rwEq(t, rwT(rw.Get("k", "a")), 0, false, nil)
		rwEq(t, rwT(rw.Revision()), int64(2), nil)
	})
	t.Run("a result has a name", func(t *testing.T) {
		rwEq(t, rwT(zestor.SetUnchanged.String(), zestor.SetCreated.String(), fmt.Sprint(zestor.SetUpdated)), "unchanged", "created", "updated")
		_ = zestor.SetResult(255).String() // is none, but must not panic
	})
}

func TestOrderOfChecks(t *testing.T) {
	errEncode, errInvalid, log := errors.New("encode"), errors.New("invalid"), ""
	codec := zestor.NewCodec(func(v any) ([]byte, error) {
		if v.(*user).Name == "unencodable" {
			return nil, errEncode
		}
		return json.Marshal(v)
	}, json.Unmarshal)
	opts := zestor.StoreOptions[*user]{
		CompareFn: func(prev, next *user) bool { log += "compare "; return *prev == *next },
		ValidateFns: map[string]zestor.ValidateFunc[*user]{"k": func(u *user) error {
			if log += "validate "; u.Age < 0 {
				return errInvalid
			}
			return nil
		}},
	}
	rwWriters(t, "kind, key, nil pointer, validator, encoding, revision, comparison", opts, codec, func(t *testing.T, rw zestor.ReadWriter[*user]) {
		memory := strings.Contains(t.Name(), "/memory")
		rwEq(t, rwT(rw.Set("k", "a", &user{})), zestor.SetCreated, nil)
		ways := map[string]func(kind, key string, u *user) error{
			"Set":     func(kind, key string, u *user) error { return rwErr(rw.Set(kind, key, u)) },
			"SetMany": func(kind, key string, u *user) error { return rw.SetMany(kind, map[string]*user{key: u}) },
			"SetFn": func(kind, key string, u *user) error {
				return rwErr(rw.SetFn(kind, key, func(*user) (*user, error) { return u, nil }))
			},
			"SetIf": func(kind, key string, u *user) error { return rwErr(rw.SetIf(kind, key, u, 99)) },
		}
		for name, set := range ways {
			rwIs(t, set("", "", nil), zestor.ErrKindRequired)
			rwIs(t, set("k", "", nil), zestor.ErrKeyRequired)
			log = ""
			if err := set("k", "a", nil); err == nil || errors.Is(err, zestor.ErrConflict) || log != "" {
				t.Errorf("%s of a nil pointer: %v, asked %q", name, err, log)
			}
			rwIs(t, set("k", "a", &user{Name: "unencodable", Age: -1}), errInvalid)
			if log = ""; !memory {
				rwIs(t, set("k", "a", &user{Name: "unencodable"}), errEncode)
				rwEq(t, rwT(log), "validate ")
			}
		}
		log = ""
		rwIs(t, ways["SetIf"]("k", "a", &user{}), zestor.ErrConflict)
		rwEq(t, rwT(log), "validate ")
		rwEq(t, rwT(rw.SetIf("k", "a", &user{}, 1)), int64(1), nil)
		rwEq(t, rwT(log), "validate validate compare ")
		rwIs(t, rw.SetMany("", nil), zestor.ErrKindRequired)
		rwEq(t, rwT(rw.Revision()), int64(1), nil)
		if !memory { // everything is encoded before anything is written
			rwIs(t, rw.SetMany("l", map[string]*user{"a": {}, "b": {Name: "unencodable"}, "c": {}}), errEncode)
			rwEq(t, rwT(rw.Count("l")), 0, nil)
		}
	})
	for name, o := range map[string]zestor.SQLiteOptions[int]{"HistoryBytes": {HistoryBytes: -1}, "BusyTimeout": {BusyTimeout: -1}, "DSN": {}} {
		t.Run("SQLite/"+name, func(t *testing.T) {
			if name != "DSN" {
				o.DSN = filepath.Join(t.TempDir(), "x.db")
			}
			if s, err := zestor.NewSQLiteStore(o); err == nil || s != nil || !strings.HasPrefix(err.Error(), "zestor: ") {
				t.Errorf("%+v: %v, %v", o, s, err)
			}
			if _, err := os.Stat(o.DSN); err == nil {
				t.Error("a file was made")
			}
		})
	}
}

func TestEquality(t *testing.T) {
	type deep struct {
		P *int
		L []string
		M map[string][]int
		S struct{ A, B string }
		F float64
	}
	n := func(i int) *int { return &i }
	values := []*deep{{}, {P: n(0)}, {P: n(1)}, {L: []string{}}, {L: []string{"a"}}, {M: map[string][]int{}}, {M: map[string][]int{"a": nil, "b": {1}}},
		{M: map[string][]int{"a": {}, "b": {1}}}, {S: struct{ A, B string }{"1", "2"}}, {F: 0.1}, {F: 1}}
	rwWriters(t, "the stores agree on values that come back as they went in", zestor.StoreOptions[*deep]{}, nil, func(t *testing.T, rw zestor.ReadWriter[*deep]) {
		again := func(d *deep) *deep { // equal, but nowhere the same
			c := new(deep)
			text, _ := json.Marshal(d)
			json.Unmarshal(text, c)
			return c
		}
		want := zestor.SetCreated
		for i, v := range values {
			rwEq(t, rwT(i, rwT(rw.Set("k", "a", v))), i, rwT(want, nil))
			rwEq(t, rwT(i, rwT(rw.Set("k", "a", again(v)))), i, rwT(zestor.SetUnchanged, nil))
			rwEq(t, rwT(i, rwT(rw.Get("k", "a"))), i, rwT(v, true, nil))
			want = zestor.SetUpdated
		}
	})
	rwWriters(t, "an interface", zestor.StoreOptions[any]{}, nil, func(t *testing.T, rw zestor.ReadWriter[any]) {
		for _, v := range []any{nil, "1", 1.0, true, []any{"a", nil}, map[string]any{"a": []any{}}, nil} {
			rwErr(rw.Set("k", "a", v))
			rwEq(t, rwT(rw.Set("k", "a", v)), zestor.SetUnchanged, nil)
			rwEq(t, rwT(rw.Get("k", "a")), v, true, nil)
		}
		rwEq(t, rwT(rw.Revision()), int64(7), nil)
	})
	type padded struct { // == would panic
		_ [0]func()
		N int
		_ [56]byte
	}
	rwWriters(t, "blank fields", zestor.StoreOptions[padded]{}, nil, func(t *testing.T, rw zestor.ReadWriter[padded]) {
		rwEq(t, rwT(rw.Set("k", "a", padded{N: 1})), zestor.SetCreated, nil)
		rwEq(t, rwT(rw.Set("k", "a", padded{N: 1})), zestor.SetUnchanged, nil)
		rwEq(t, rwT(rw.Set("k", "a", padded{N: 2})), zestor.SetUpdated, nil)
	})
	opts := zestor.StoreOptions[string]{CompareFn: func(prev, next string) bool {
		return strings.EqualFold(prev, next) || strings.HasPrefix(prev, next) // prev, then next
	}}
	rwWriters(t, "CompareFn decides in every write", opts, nil, func(t *testing.T, rw zestor.ReadWriter[string]) {
		rwEq(t, rwT(rw.Set("k", "a", "Value")), zestor.SetCreated, nil)
		rwEq(t, rwT(rw.Set("k", "a", "VALUE")), zestor.SetUnchanged, nil)
		rwEq(t, rwT(rw.Set("k", "a", "Val")), zestor.SetUnchanged, nil)
		check(t, rw.SetMany("k", map[string]string{"a": "value"}))
		rwEq(t, rwT(rw.SetIf("k", "a", "value", 1)), int64(1), nil)
		rwEq(t, rwT(rw.SetFn("k", "a", func(string) (string, error) { return "value", nil })), false, nil)
		rwEq(t, rwT(rwEntry(t, rw, "k", "a")), zestor.Entry[string]{Kind: "k", Key: "a", Value: "Value", Version: 1, Revision: 1})
		rwEq(t, rwT(rw.Set("k", "a", "Values")), zestor.SetUpdated, nil)
	})
}

func TestVersions(t *testing.T) {
	rwWriters(t, "a version counts per key, a revision per store", zestor.StoreOptions[int]{}, nil, func(t *testing.T, rw zestor.ReadWriter[int]) {
		at := func(kind, key string, version, revision int64) {
			t.Helper()
			e := rwEntry(t, rw, kind, key)
			rwEq(t, rwT(e.Version, e.Revision), version, revision)
		}
		rw.Set("k", "a", 1)
		rw.Set("l", "a", 1)
		rw.Set("k", "a", 2)
		rw.Set("k", "a", 2)
		at("k", "a", 2, 3)
		at("l", "a", 1, 2)
		rw.SetFn("k", "a", func(v int) (int, error) { return v + 1, nil })
		at("k", "a", 3, 4)
		rw.Delete("k", "a") // 5
		rw.Delete("k", "a")
		rwEq(t, rwT(rw.Revision()), int64(5), nil)
		rw.Set("k", "a", 3)
		at("k", "a", 1, 6)
	})
	rwWriters(t, "SetIf", zestor.StoreOptions[int]{}, nil, func(t *testing.T, rw zestor.ReadWriter[int]) {
		conflict := func(value int, revision int64) {
			t.Helper()
			before := rwState(rw)
			got, err := rw.SetIf("k", "a", value, revision)
			rwEq(t, rwT(got), int64(0))
			rwIs(t, err, zestor.ErrConflict)
			rwEq(t, rwState(rw), before...)
		}
		conflict(1, 1) // absent, and a revision other than 0
		conflict(1, -1)
		rwEq(t, rwT(rw.SetIf("k", "a", 1, 0)), int64(1), nil)
		conflict(1, 0) // exists, though equal
		conflict(2, 0)
		conflict(2, 2)
		conflict(2, -1)
		rwEq(t, rwT(rw.SetIf("k", "a", 1, 1)), int64(1), nil) // equal: nothing is written
		rwEq(t, rwT(rw.SetIf("k", "a", 2, 1)), int64(2), nil)
		conflict(2, 1)
		rwEq(t, rwT(rw.Delete("k", "a")), true, 2, nil)
		conflict(3, 2)
		rwEq(t, rwT(rw.SetIf("k", "a", 2, 0)), int64(4), nil)
		conflict(3, 2) // created again: never taken for the old one
		rwEq(t, rwT(rwEntry(t, rw, "k", "a")), zestor.Entry[int]{Kind: "k", Key: "a", Value: 2, Version: 1, Revision: 4})
	})
}

// rwChange does every kind of change, to kinds k and l.
func rwChange(t testing.TB, w zestor.Writer[string]) {
	rwEq(t, rwT(w.Set("k", "new", "1")), zestor.SetCreated, nil)
	rwEq(t, rwT(w.Set("k", "new", "2")), zestor.SetUpdated, nil)
	rwEq(t, rwT(w.Set("k", "a", "2")), zestor.SetUpdated, nil)
	rwEq(t, rwT(w.Delete("k", "a")), true, "2", nil)
	rwEq(t, rwT(w.Set("k", "a", "3")), zestor.SetCreated, nil)
	rwEq(t, rwT(w.Delete("k", "b")), true, "1", nil)
	rwEq(t, rwT(w.SetFn("l", "a", func(v string) (string, error) { return v + "!", nil })), true, nil)
	check(t, w.SetMany("m", map[string]string{"a": "1", "b": "1"}))
	rwEq(t, rwT(w.Delete("m", "a")), true, "1", nil)
}

// oddError prints itself, as errors of some packages do, and has no text where it is nil.
type oddError struct{ text string }

func (e *oddError) Error() string              { return e.text }
func (e *oddError) Format(f fmt.State, _ rune) { io.WriteString(f, e.text) }

func TestOddErrors(t *testing.T) {
	refuse := func(string) error { return &oddError{"email required"} }
	eachWith(t, zestor.StoreOptions[string]{ValidateFns: map[string]zestor.ValidateFunc[string]{"users": refuse}}, func(t *testing.T, s zestor.Store[string]) {
		_, err := s.Set("users", "alice", "a")
		if odd := (*oddError)(nil); err == nil || err.Error() != "zestor: set users/alice: email required" || !errors.As(err, &odd) {
			t.Error(err)
		}
		null := error((*oddError)(nil)) // not a nil error
		if err := s.Update(func(zestor.ReadWriter[string]) error { return null }); err != null {
			t.Error(err)
		}
		if err := s.View(func(zestor.Reader[string]) error { return null }); err != null {
			t.Error(err)
		}
	})
}

// The map of validators stays the caller's, who may change it.
func TestOptionsAreCopied(t *testing.T) {
	validators := make(map[string]zestor.ValidateFunc[int])
	eachWith(t, zestor.StoreOptions[int]{ValidateFns: validators}, func(t *testing.T, s zestor.Store[int]) {
		validators["k"] = func(int) error { return errors.New("not the store's") }
		defer clear(validators)
		rwEq(t, rwT(s.Set("k", "a", 1)), zestor.SetCreated, nil)
	})
}

func TestNilFunctions(t *testing.T) {
	none := func(t *testing.T, err error, text string) {
		t.Helper()
		if fmt.Sprint(err) != text {
			t.Errorf("error %q, want %q", fmt.Sprint(err), text)
		}
	}
	each(t, func(t *testing.T, s zestor.Store[int]) {
		check(t, s.SetMany("k", map[string]int{"a": 1}))
		none(t, s.View(nil), "zestor: view: function is nil")
		none(t, s.Update(nil), "zestor: update: function is nil")
		_, err := s.SetFn("k", "a", nil)
		none(t, err, "zestor: setfn k/a: function is nil")
		var ctx context.Context
		_, err = s.Watch(ctx, "k")
		none(t, err, "zestor: watch k: context is nil")
		list, err := s.List("k", nil, func(string, int) bool { return true }, nil)
		rwEq(t, rwT(list), map[string]int{"a": 1})
		check(t, err)
	})
	s := openSQLite(t, zestor.SQLiteOptions[int]{DSN: ":memory:", Codec: zestor.NewCodec(json.Marshal, nil)})
	rwEq(t, rwT(s.Set("k", "a", 1)), zestor.SetCreated, nil)
	_, _, err := s.Get("k", "a")
	none(t, err, "zestor: get k/a: codec has no unmarshal function")
	s = openSQLite(t, zestor.SQLiteOptions[int]{DSN: ":memory:", Codec: zestor.NewCodec(nil, json.Unmarshal)})
	_, err = s.Set("k", "a", 1)
	none(t, err, "zestor: set k/a: codec has no marshal function")
}

func TestTransactions(t *testing.T) {
	begin := map[string]string{"a": "1", "b": "1", "c": "1"}
	failed := errors.New("failed")
	rwEach(t, "after an error, a panic or a Goexit nothing remains, and no event", func(t *testing.T, s zestor.Store[string]) {
		check(t, s.SetMany("k", begin))
		check(t, s.SetMany("l", begin))
		check(t, s.SetMany("k", map[string]string{"a": "0", "b": "0"}))
		check(t, s.SetMany("k", begin))
		events := watchOn(t, s, "k")
		before, revision := rwState(s), int64(10)
		for how, end := range map[any]func() error{
			"return": func() error { return failed },
			failed:   func() error { panic(failed) },
			"goexit": func() error { runtime.Goexit(); return nil },
		} {
			var err error
			rwEq(t, rwT(rwEnd(func() {
				err = s.Update(func(tx zestor.ReadWriter[string]) error { rwChange(t, tx); return end() })
			})), how)
			if how == "return" && err != failed {
				t.Errorf("got %v, want fn's error as it is", err)
			}
			rwEq(t, rwState(s), before...)
			// What it would have used is given again, and the next event is the next change's.
			revision++
			rwEq(t, rwT(s.SetIf("k", "x", fmt.Sprint(how), 0)), revision, nil)
			ev := <-events
			rwEq(t, rwT(ev.Type, ev.Key, ev.Value, ev.Revision), zestor.EventCreate, "x", fmt.Sprint(how), revision)
			revision++
			rwEq(t, rwT(s.Delete("k", "x")), true, fmt.Sprint(how), nil)
			rwEq(t, rwT((<-events).Type), zestor.EventDelete)
			before[len(before)-1] = rwT(revision, nil)
		}
		if err := s.View(func(zestor.Reader[string]) error { return failed }); err != failed {
			t.Errorf("View returned %v", err)
		}
	})
	rwEach(t, "the tx reads its own writes, and each change takes its own revision", func(t *testing.T, s zestor.Store[string]) {
		check(t, s.SetMany("k", begin))
		check(t, s.SetMany("l", begin))
		events := watchOn(t, s, "k")
		var inside []any
		rwUpdate(t, s, func(tx zestor.ReadWriter[string]) {
			rwChange(t, tx)
			rwEq(t, rwT(rwScan(t, tx, "k", zestor.Range{Descending: true})), []string{"new=2", "c=1", "a=3"})
			rwEq(t, rwT(rwEntry(t, tx, "k", "a")), zestor.Entry[string]{Kind: "k", Key: "a", Value: "3", Version: 1, Revision: 11})
			rwIs(t, rwErr(tx.SetIf("k", "a", "4", 1)), zestor.ErrConflict)
			rwEq(t, rwT(tx.SetIf("k", "a", "4", 11)), int64(17), nil)
			rwEq(t, rwT(tx.Get("k", "b")), "", false, nil)
			rwEq(t, rwT(tx.GetAll()), map[string]map[string]string{"k": {"a": "4", "c": "1", "new": "2"}, "l": {"a": "1!", "b": "1", "c": "1"}, "m": {"b": "1"}}, nil)
			rwEq(t, rwT(tx.Revision()), int64(17), nil)
			inside = rwState(tx)
		})
		rwEq(t, rwState(s), inside...)
		for i, want := range []string{"create new 1 1", "update new 2 2", "update a 2 2", "delete a 2 2", "create a 3 1", "delete b 1 1", "update a 4 2"} {
			ev := <-events
			rwEq(t, rwT(fmt.Sprint(ev.Type, " ", ev.Key, " ", ev.Value, " ", ev.Version)), want)
			rwEq(t, rwT(ev.Revision), int64(7+i+i/6*4))
		}
		rwUpdate(t, s, func(zestor.ReadWriter[string]) {})
		rwEq(t, rwT(s.Revision()), int64(17), nil)
	})
	opts := zestor.StoreOptions[string]{ValidateFns: map[string]zestor.ValidateFunc[string]{"k": func(v string) error {
		if v == "bad" {
			return failed
		}
		return nil
	}}}
	codec := zestor.NewCodec(func(v any) ([]byte, error) {
		if v == "unencodable" {
			return nil, failed
		}
		return json.Marshal(v)
	}, json.Unmarshal)
	rwEachWith(t, "a call that fails inside changes nothing, and the rest is committed", opts, codec, func(t *testing.T, s zestor.Store[string]) {
		check(t, s.SetMany("k", begin))
		check(t, s.Update(func(tx zestor.ReadWriter[string]) error {
			rwErr(tx.Set("k", "a", "2"))
			before := rwState(tx)
			rwIs(t, rwErr(tx.Set("k", "a", "bad")), failed)
			rwIs(t, tx.SetMany("k", map[string]string{"a": "3", "b": "bad", "d": "3"}), failed)
			if !strings.HasSuffix(t.Name(), "/memory") {
				rwIs(t, rwErr(tx.Set("k", "a", "unencodable")), failed)
				rwIs(t, tx.SetMany("k", map[string]string{"a": "3", "b": "unencodable", "d": "3"}), failed)
			}
			rwIs(t, rwErr(tx.SetFn("k", "absent", func(v string) (string, error) { return v, nil })), zestor.ErrKeyNotFound)
			rwIs(t, rwErr(tx.SetFn("k", "a", func(v string) (string, error) { return "3", failed })), failed)
			rwIs(t, rwErr(tx.SetIf("k", "b", "3", 99)), zestor.ErrConflict)
			rwIs(t, rwErr(tx.Set("", "b", "3")), zestor.ErrKindRequired)
			func() {
				defer func() { rwEq(t, rwT(recover()), "boom") }()
				tx.SetFn("k", "a", func(v string) (string, error) { panic("boom") })
			}()
			rwEq(t, rwState(tx), before...)
			return rwErr(tx.Set("k", "c", "2"))
		}))
		rwEq(t, rwT(rwScan(t, s, "k", zestor.Range{})), []string{"a=2", "b=1", "c=2"})
		rwEq(t, rwT(s.Revision()), int64(5), nil)
	})
	rwEach(t, "a tx used afterwards gives ErrTxDone", func(t *testing.T, s zestor.Store[string]) {
		check(t, s.SetMany("k", begin))
		for _, end := range []func(){func() {}, runtime.Goexit} {
			var calls []rwCall
			keep := func(r zestor.Reader[string]) {
				seq := r.Scan("k", zestor.Range{})
				next, stop := iter.Pull2(seq)
				next()
				t.Cleanup(stop)
				calls = append(append(calls, rwReads(r)...), rwCall{"a kept Scan", 0, func(_, _ string) error { return rwLast(seq) }},
					rwCall{"a Scan under way", 0, func(kind, _ string) error {
						if kind == "" {
							return zestor.ErrTxDone // its first error was its last
						}
						_, err, _ := next()
						return err
					}})
			}
			rwEnd(func() { s.View(func(tx zestor.Reader[string]) error { keep(tx); end(); return nil }) })
			rwEnd(func() {
				s.Update(func(tx zestor.ReadWriter[string]) error {
					keep(tx)
					calls = append(calls, rwWrites(tx)...)
					end()
					return nil
				})
			})
			rwEq(t, rwT(len(calls)), 2*11+5)
			for _, c := range calls {
				for _, kind := range []string{"k", ""} { // checked before the kind
					if err := c.do(kind, "a"); !errors.Is(err, zestor.ErrTxDone) {
						t.Errorf("%s: %v", c.op, err)
					}
				}
			}
		}
		rwEq(t, rwT(s.Set("k", "z", "")), zestor.SetCreated, nil)
		rwEq(t, rwT(rwScan(t, s, "k", zestor.Range{})), []string{"a=1", "b=1", "c=1", "z="})
	})
	rwEach(t, "View sees one snapshot, whatever is written meanwhile", func(t *testing.T, s zestor.Store[string]) {
		check(t, s.SetMany("k", begin))
		var before []any
		written := make(chan error, 1)
		check(t, s.View(func(tx zestor.Reader[string]) error {
			before = rwState(tx)
			go func() {
				written <- s.Update(func(tx zestor.ReadWriter[string]) error {
					tx.Delete("k", "a")
					tx.Set("k", "b", "2")
					return tx.SetMany("l", begin)
				})
			}()
			if strings.HasSuffix(t.Name(), "/sqlite") { // the others wait for each other
				check(t, <-written)
				rwEq(t, rwT(s.Revision()), int64(8), nil)
				written <- nil
			}
			for range 100 {
				rwEq(t, rwState(tx), before...)
				runtime.Gosched()
			}
			rwEq(t, rwT(rwScan(t, tx, "k", zestor.Range{})), []string{"a=1", "b=1", "c=1"})
			return nil
		}))
		check(t, <-written)
		rwEq(t, rwT(rwScan(t, s, "k", zestor.Range{})), []string{"b=2", "c=1"})
	})
	rwEach(t, "the tx of View can't be asserted into a writer", func(t *testing.T, s zestor.Store[string]) {
		rwView(t, s, func(tx zestor.Reader[string]) {
			_, set := tx.(interface {
				Set(kind, key, value string) (zestor.SetResult, error)
			})
			_, remove := tx.(interface {
				Delete(kind, key string) (bool, string, error)
			})
			_, writer := tx.(zestor.Writer[string])
			_, open := tx.(struct{ zestor.Reader[string] })
			rwEq(t, rwT(set, remove, writer, open), false, false, false, false)
			if v := reflect.ValueOf(tx); v.Kind() == reflect.Struct {
				for i := range v.NumField() {
					rwEq(t, rwT(v.Field(i).CanInterface()), false)
				}
			}
		})
	})
	for _, kind := range []string{"sqlite", "sqlite-rollback"} {
		t.Run("after an error of SQLite Update fails whatever fn returns/"+kind, func(t *testing.T) {
			s, path := watchFile(t, zestor.SQLiteOptions[string]{DisableWAL: kind == "sqlite-rollback"})
			check(t, s.SetMany("k", begin))
			fileSQL(t, path, `CREATE TRIGGER refuse BEFORE INSERT ON zestor_kv WHEN new.key = 'no' BEGIN SELECT RAISE(ABORT, 'refused'); END`)
			fails := func(err error) {
				t.Helper()
				cause := err
				for errors.Unwrap(cause) != nil {
					cause = errors.Unwrap(cause)
				}
				if fmt.Sprintf("%T", cause) != "sqlite3.Error" || !strings.HasPrefix(err.Error(), "zestor: ") {
					t.Errorf("got %v, want an error of SQLite", err)
				}
			}
			fails(rwErr(s.Set("k", "no", "")))
			fails(s.SetMany("k", map[string]string{"a": "2", "no": "", "z": ""}))
			before := rwState(s)
			fails(s.Update(func(tx zestor.ReadWriter[string]) error {
				rwErr(tx.Set("k", "b", "2"))
				fails(rwErr(tx.Set("k", "no", "")))
				tx.Set("k", "c", "2")
				return nil
			}))
			rwEq(t, rwState(s), before...)
			rwEq(t, rwT(s.SetIf("k", "yes", "", 0)), int64(4), nil)
		})
	}
}

func TestCallbacks(t *testing.T) {
	var armed, end atomic.Value
	armed.Store("")
	fire := func(at string) {
		if armed.Load() == at {
			end.Load().(func())()
		}
	}
	opts := zestor.StoreOptions[int]{
		CompareFn:   func(prev, next int) bool { fire("comparer"); return prev == next },
		ValidateFns: map[string]zestor.ValidateFunc[int]{"k": func(int) error { fire("validator"); return nil }},
	}
	codec := zestor.NewCodec(
		func(v any) ([]byte, error) { fire("Marshal"); return json.Marshal(v) },
		func(data []byte, v any) error { fire("Unmarshal"); return json.Unmarshal(data, v) })
	type (
		reader = zestor.Reader[int]
		writer = zestor.ReadWriter[int]
	)
	calls := []struct {
		op, at string // what is called, and where it can go wrong
		do     func(s zestor.Store[int])
	}{
		{"Get", "Unmarshal", func(s zestor.Store[int]) { s.Get("k", "b") }},
		{"GetEntry", "Unmarshal", func(s zestor.Store[int]) { s.GetEntry("k", "b") }},
		{"List", "Unmarshal filter", func(s zestor.Store[int]) { s.List("k", func(string, int) bool { fire("filter"); return true }) }},
		{"Values", "Unmarshal", func(s zestor.Store[int]) { s.Values("k") }},
		{"GetAll", "Unmarshal", func(s zestor.Store[int]) { s.GetAll() }},
		{"Scan", "Unmarshal", func(s zestor.Store[int]) { rwLast(s.Scan("k", zestor.Range{})) }},
		{"Set", "validator Marshal Unmarshal comparer", func(s zestor.Store[int]) { s.Set("k", "b", 7) }},
		{"SetMany", "validator Marshal Unmarshal comparer", func(s zestor.Store[int]) { s.SetMany("k", map[string]int{"a": 7, "b": 7}) }},
		{"SetIf", "validator Marshal Unmarshal comparer", func(s zestor.Store[int]) { s.SetIf("k", "a", 7, 1) }},
		{"SetFn", "fn validator Marshal Unmarshal comparer", func(s zestor.Store[int]) {
			s.SetFn("k", "b", func(int) (int, error) { fire("fn"); return 7, nil })
		}},
		{"Delete", "Unmarshal", func(s zestor.Store[int]) { s.Delete("k", "b") }},
		{"View", "fn Unmarshal filter", func(s zestor.Store[int]) {
			s.View(func(tx reader) error {
				fire("fn")
				for range tx.Scan("k", zestor.Range{}) {
					tx.List("k", func(string, int) bool { fire("filter"); return true })
				}
				return nil
			})
		}},
		{"Update", "fn validator Marshal Unmarshal comparer filter", func(s zestor.Store[int]) {
			s.Update(func(tx writer) error {
				tx.SetMany("l", map[string]int{"x": 1, "y": 1})
				tx.Delete("l", "x")
				tx.Set("k", "b", 7)
				tx.List("k", func(string, int) bool { fire("filter"); return true })
				fire("fn")
				return nil
			})
		}},
	}
	rwEachWith(t, "one that panics or calls Goexit leaves the store unlocked, unchanged and usable", opts, codec, func(t *testing.T, s zestor.Store[int]) {
		check(t, s.SetMany("k", map[string]int{"a": 1, "b": 1}))
		for _, c := range calls {
			for _, at := range strings.Fields(c.at) {
				if strings.HasSuffix(t.Name(), "/memory") && strings.HasSuffix(at, "arshal") {
					continue
				}
				for how, f := range map[string]func(){"boom": func() { panic("boom") }, "goexit": runtime.Goexit} {
					t.Run(at+" in "+c.op+" "+how, func(t *testing.T) {
						rwUpdate(t, s, func(tx writer) { tx.Delete("k", "b"); tx.Set("k", "b", 1) })
						before := rwState(s)
						end.Store(f)
						armed.Store(at)
						got := rwEnd(func() { c.do(s) })
						armed.Store("")
						rwEq(t, rwT(got), how)
						rwEq(t, rwState(s), before...)
						e := rwEntry(t, s, "k", "b")
						rwEq(t, rwT(s.SetIf("k", "b", 2, e.Revision)), e.Revision+1, nil)
					})
				}
			}
		}
	})
	rwEachWith(t, "one that panics in a tx, and is recovered there, changes nothing", opts, codec, func(t *testing.T, s zestor.Store[int]) {
		check(t, s.SetMany("k", map[string]int{"b": 1, "c": 1}))
		end.Store(func() { panic("boom") })
		rwUpdate(t, s, func(tx writer) {
			before := rwState(tx)
			for _, c := range []struct {
				at string
				do func()
			}{
				{"comparer", func() { tx.SetMany("k", map[string]int{"a": 7, "b": 7}) }}, // a is new, b compared
				{"Unmarshal", func() { tx.Delete("k", "c") }},
			} {
				if c.at == "Unmarshal" && strings.HasSuffix(t.Name(), "/memory") {
					continue
				}
				func() {
					defer armed.Store("")
					defer func() { rwEq(t, rwT(recover()), "boom") }()
					armed.Store(c.at)
					c.do()
				}()
				if now := rwState(tx); !reflect.DeepEqual(now, before) {
					t.Errorf("%s: got %v, want %v", c.at, now, before)
					before = now
				}
			}
		})
	})
	errInvalid := errors.New("invalid")
	odd := func(v any) {
		switch v {
		case -1, -3:
			panic("boom")
		case -2, -4:
			runtime.Goexit()
		}
	}
	opts = zestor.StoreOptions[int]{ValidateFns: map[string]zestor.ValidateFunc[int]{"k": func(v int) error {
		if v == -9 {
			return errInvalid
		}
		if v >= -2 { // the others are left to the codec
			odd(v)
		}
		return nil
	}}}
	codec = zestor.NewCodec(func(v any) ([]byte, error) { odd(v); return json.Marshal(v) }, json.Unmarshal)
	rwEachWith(t, "one that panics hurts no other goroutine's call", opts, codec, func(t *testing.T, s zestor.Store[int]) {
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				key := fmt.Sprint(g)
				rwEq(t, rwT(s.Set("k", key, 0)), zestor.SetCreated, nil)
				for i := range 8 {
					if g%2 == 1 {
						rwEq(t, rwT(s.Set("k", key, i+1)), zestor.SetUpdated, nil)
						rwEq(t, rwT(s.Get("k", key)), i+1, true, nil)
						continue
					}
					rwEq(t, rwT(rwEnd(func() { s.Set("k", "bad", -1-i%2) })), []any{"boom", "goexit"}[i%2])
					rwIs(t, rwErr(s.Set("k", "bad", -9)), errInvalid)
					if !strings.HasSuffix(t.Name(), "/memory") {
						rwEq(t, rwT(rwEnd(func() { s.SetIf("k", "bad", -3-i%2, 0) })), []any{"boom", "goexit"}[i%2])
					}
				}
			})
		}
		wg.Wait()
		rwEq(t, rwT(s.Count("k")), 8, nil)
		rwEq(t, rwT(s.Revision()), int64(8+4*8), nil)
	})
	t.Run("a codec that calls Goexit under a watch", func(t *testing.T) {
		var exits atomic.Int32
		exited := make(chan bool, 1)
		s := openSQLite(t, zestor.SQLiteOptions[int]{DSN: ":memory:", Codec: zestor.NewCodec(json.Marshal, func(data []byte, v any) error {
			if string(data) == "13" && exits.Add(1) == 1 {
				exited <- true
				runtime.Goexit()
			}
			return json.Unmarshal(data, v)
		})})
		events := watchOn(t, s, "k")
		rwEq(t, rwT(s.Set("k", "a", 13)), zestor.SetCreated, nil)
		<-exited
		rwEq(t, rwT(s.Set("k", "a", 14)), zestor.SetUpdated, nil)
		again := watchOn(t, s, "k", zestor.WithInitialReplay())
		rwEq(t, rwT((<-again).Value, (<-again).Type), 14, zestor.EventSynced)
		check(t, s.Close())
		for range events { // closes
		}
	})
}

type rwPointer *user // a named pointer type

// rwSpy is a codec that notes what it is handed.
type rwSpy struct{ marshaled, unmarshaled []any }

func (c *rwSpy) Marshal(v any) ([]byte, error) {
	c.marshaled = append(c.marshaled, v)
	return json.Marshal(v)
}

func (c *rwSpy) Unmarshal(data []byte, v any) error {
	c.unmarshaled = append(c.unmarshaled, v)
	return json.Unmarshal(data, v)
}

// rwHanded checks what a codec of T is handed for a value: Marshal the value
// itself, Unmarshal a fresh pointer to an E.
func rwHanded[T, E any](t *testing.T, value T) {
	t.Run(fmt.Sprintf("Marshal and Unmarshal of a %T", value), func(t *testing.T) {
		spy := &rwSpy{}
		s := openSQLite(t, zestor.SQLiteOptions[T]{DSN: ":memory:", Codec: spy})
		rwEq(t, rwT(s.Set("k", "a", value)), zestor.SetCreated, nil)
		rwEq(t, rwT(s.Set("k", "b", value)), zestor.SetCreated, nil)
		for _, key := range []string{"a", "a", "b"} {
			rwEq(t, rwT(s.Get("k", key)), value, true, nil)
		}
		rwEq(t, rwT(s.List("k")), map[string]T{"a": value, "b": value}, nil)
		if v, ok := spy.marshaled[0].(T); !ok || any(v) != any(value) {
			t.Errorf("Marshal was handed %T %v", spy.marshaled[0], spy.marshaled[0])
		}
		seen := map[uintptr]bool{reflect.ValueOf(&value).Pointer(): true}
		for _, v := range spy.unmarshaled {
			r := reflect.ValueOf(v)
			if !r.CanConvert(reflect.TypeFor[*E]()) || seen[r.Pointer()] {
				t.Errorf("Unmarshal was handed %T, want a fresh %v", v, reflect.TypeFor[*E]())
			}
			seen[r.Pointer()] = true
		}
		rwEq(t, rwT(len(spy.unmarshaled)), 5)
	})
}

func rwNil[T any](t *testing.T, good, null T) {
	rwWriters(t, fmt.Sprintf("a nil %T as %v is refused by both stores", null, reflect.TypeFor[T]()), zestor.StoreOptions[T]{}, nil, func(t *testing.T, rw zestor.ReadWriter[T]) {
		rwEq(t, rwT(rw.Set("k", "a", good)), zestor.SetCreated, nil)
		for i, err := range []error{
			rwErr(rw.Set("k", "a", null)), rwErr(rw.Set("k", "b", null)), rwErr(rw.SetIf("k", "a", null, 1)), rwErr(rw.SetIf("k", "b", null, 0)),
			rw.SetMany("k", map[string]T{"0": good, "b": null, "c": good}),
			rwErr(rw.SetFn("k", "a", func(T) (T, error) { return null, nil })),
		} {
			if err == nil || !strings.HasPrefix(err.Error(), "zestor: ") || !strings.Contains(err.Error(), "k/") {
				t.Errorf("%d: %v", i, err)
			}
		}
		rwEq(t, rwT(rw.List("k")), map[string]T{"a": good}, nil)
		rwEq(t, rwT(rw.Set("k", "a", good)), zestor.SetUnchanged, nil)
	})
}

func TestCodecs(t *testing.T) {
	pointer := &user{Name: "A"}
	rwHanded[user, user](t, user{Name: "A"})
	rwHanded[*user, user](t, pointer)
	rwHanded[rwPointer, user](t, rwPointer(pointer))
	rwHanded[**user, *user](t, &pointer)
	rwHanded[int, int](t, 7)
	rwHanded[any, any](t, "x")
	rwNil(t, pointer, nil)
	rwNil(t, rwPointer(pointer), nil)
	rwNil(t, &pointer, nil)
	rwNil[any](t, "x", (*user)(nil))
	for name, codec := range map[string]zestor.Codec{"JSON{}": zestor.JSON{}, "&JSON{}": &zestor.JSON{}, "nil": nil, "NewCodec": zestor.NewCodec(json.Marshal, json.Unmarshal)} {
		t.Run(name, func(t *testing.T) {
			s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: ":memory:", Codec: codec})
			rwEq(t, rwT(s.Set("k", "a", user{Name: "<A>\x00"})), zestor.SetCreated, nil)
			rwEq(t, rwT(s.Get("k", "a")), user{Name: "<A>\x00"}, true, nil)
		})
	}
	raw := zestor.NewCodec(func(v any) ([]byte, error) {
		switch v := v.([]byte); string(v) {
		case "nil":
			return nil, nil
		case "empty":
			return []byte{}, nil
		default:
			return v, nil
		}
	}, func(data []byte, v any) error {
		*v.(*[]byte) = data
		return nil
	})
	rwEachWith(t, "an empty or nil encoding is stored and read back", zestor.StoreOptions[[]byte]{}, raw, func(t *testing.T, s zestor.Store[[]byte]) {
		if strings.HasSuffix(t.Name(), "/memory") {
			return // has no codec
		}
		rwEq(t, rwT(s.Set("k", "a", []byte("nil"))), zestor.SetCreated, nil)
		rwEq(t, rwT(s.Set("k", "a", []byte("empty"))), zestor.SetUnchanged, nil)
		check(t, s.SetMany("k", map[string][]byte{"b": []byte("empty"), "c": {}, "d": []byte("x"), "e": []byte("\x00y")}))
		rwUpdate(t, s, func(tx zestor.ReadWriter[[]byte]) { tx.SetIf("k", "d", []byte("nil"), 4) })
		var kept []zestor.Entry[[]byte] // what a codec kept is its own, whatever is read and written later
		rwReaders(t, s, func(t *testing.T, r zestor.Reader[[]byte]) {
			rwEq(t, rwT(fmt.Sprintf("%q", rwScan(t, r, "k", zestor.Range{}))), `["a=[]" "b=[]" "c=[]" "d=[]" "e=[0 121]"]`)
			v, ok, err := r.Get("k", "a")
			rwEq(t, rwT(len(v), ok, err), 0, true, nil)
			values, err := r.Values("k")
			check(t, err)
			kept = append(kept, values...)
		})
		rwEq(t, rwT(s.SetFn("k", "e", func([]byte) ([]byte, error) { return []byte("nil"), nil })), true, nil)
		existed, prev, err := s.Delete("k", "e")
		rwEq(t, rwT(existed, len(prev), err), true, 0, nil)
		check(t, s.SetMany("k", map[string][]byte{"a": []byte("zz"), "b": []byte("zz"), "e": []byte("zz")}))
		rwScan(t, s, "k", zestor.Range{})
		for _, e := range kept {
			rwEq(t, rwT(e.Key, string(e.Value)), e.Key, map[string]string{"e": "\x00y"}[e.Key])
		}
	})
}

// rwText encodes all strings and decodes none that begin with "bad".
var (
	errRwRefused = errors.New("refused")
	rwText       = zestor.NewCodec(func(v any) ([]byte, error) { return []byte(v.(string)), nil }, func(data []byte, v any) error {
		*v.(*string) = string(data)
		if strings.HasPrefix(string(data), "bad") {
			return errRwRefused
		}
		return nil
	})
)

func TestUndecodable(t *testing.T) {
	names := func(t testing.TB, err error, what string) {
		t.Helper()
		if rwIs(t, err, errRwRefused); !strings.Contains(err.Error(), what) {
			t.Errorf("%v does not name %s", err, what)
		}
	}
	for _, opts := range []zestor.StoreOptions[string]{{}, {CompareFn: func(prev, next string) bool {
		if prev == "" || strings.HasPrefix(prev, "bad") {
			t.Errorf("CompareFn was asked about %q and %q", prev, next)
		}
		return prev == next
	}}} {
		for _, kind := range kinds[1:] {
			t.Run(fmt.Sprintf("CompareFn %t/%s", opts.CompareFn != nil, kind), func(t *testing.T) {
				s := rwOpen(t, kind, opts, rwText)
				check(t, s.SetMany("k", map[string]string{"a": "1", "b": "bad1", "c": "2", "d": "bad2", "e": "3"}))
				check(t, s.SetMany("l", map[string]string{"a": "1"}))
				rwReaders(t, s, func(t *testing.T, r zestor.Reader[string]) {
					v, ok, err := r.Get("k", "b")
					rwEq(t, rwT(v, ok), "", false)
					names(t, err, "k/b")
					e, ok, err := r.GetEntry("k", "d")
					if names(t, err, "k/d"); e.UpdatedAt.IsZero() {
						t.Error("no time")
					}
					e.UpdatedAt = time.Time{}
					rwEq(t, rwT(e, ok), zestor.Entry[string]{Kind: "k", Key: "d", Version: 1, Revision: 4}, true)
					got := []string{}
					for e, err := range r.Scan("k", zestor.Range{}) {
						if got = append(got, fmt.Sprint(e.Kind, e.Key, e.Value, " ", e.Version, e.Revision)); (e.Value == "") != (err != nil) || e.UpdatedAt.IsZero() {
							t.Errorf("%v %v", e, err)
						} else if err != nil {
							names(t, err, "k/"+e.Key)
						}
					}
					rwEq(t, rwT(got), []string{"ka1 1 1", "kb 1 2", "kc2 1 3", "kd 1 4", "ke3 1 5"})
					list, err := r.List("k")
					rwEq(t, rwT(list), map[string]string(nil))
					names(t, err, "k/b")
					values, err := r.Values("k")
					rwEq(t, rwT(values), []zestor.Entry[string](nil))
					names(t, err, "k/b")
					all, err := r.GetAll()
					rwEq(t, rwT(all), map[string]map[string]string(nil))
					names(t, err, "k/b")
					rwEq(t, rwT(r.Keys("k")), []string{"a", "b", "c", "d", "e"}, nil)
					rwEq(t, rwT(r.Count("k")), 5, nil)
					rwEq(t, rwT(r.List("l")), map[string]string{"a": "1"}, nil)
				})
				write := func(w zestor.ReadWriter[string]) {
					changed, err := w.SetFn("k", "b", func(string) (string, error) { t.Error("fn was called"); return "", nil })
					rwEq(t, rwT(changed), false)
					names(t, err, "k/b")
					e, _, _ := w.GetEntry("k", "b")
					rwEq(t, rwT(w.Set("k", "b", "good")), zestor.SetUpdated, nil)
					rwEq(t, rwT(rwEntry(t, w, "k", "b").Version), e.Version+1)
					rwEq(t, rwT(w.Delete("k", "d")), true, "", nil)
					rwEq(t, rwT(w.Delete("k", "d")), false, "", nil)
					rwErr(w.Set("k", "d", "bad"))
					e, _, _ = w.GetEntry("k", "d")
					rwIs(t, rwErr(w.SetIf("k", "d", "good", e.Revision-1)), zestor.ErrConflict)
					rwEq(t, rwT(w.SetIf("k", "d", "good", e.Revision)), e.Revision+1, nil)
					check(t, w.SetMany("k", map[string]string{"d": "bad", "b": "bad"}))
					check(t, w.SetMany("k", map[string]string{"d": "better"}))
					rwEq(t, rwT(w.Get("k", "d")), "better", true, nil)
					check(t, w.SetMany("k", map[string]string{"d": "bad"}))
				}
				write(s)
				rwUpdate(t, s, func(tx zestor.ReadWriter[string]) { write(tx) })
			})
		}
	}
	t.Run("written by another type", func(t *testing.T) {
		texts, path := watchFile(t, zestor.SQLiteOptions[string]{})
		numbers := openSQLite(t, zestor.SQLiteOptions[int]{DSN: path})
		rwEq(t, rwT(texts.Set("texts", "a", "text")), zestor.SetCreated, nil)
		rwEq(t, rwT(numbers.Set("numbers", "a", 1)), zestor.SetCreated, nil)
		var e *json.UnmarshalTypeError
		if err := rwErr(numbers.Get("texts", "a")); !errors.As(err, &e) || !strings.Contains(err.Error(), "texts/a") {
			t.Error(err)
		}
		rwEq(t, rwT(numbers.List("numbers")), map[string]int{"a": 1}, nil)
		rwEq(t, rwT(texts.List("texts")), map[string]string{"a": "text"}, nil)
		rwEq(t, rwT(numbers.Delete("texts", "a")), true, 0, nil)
		rwEq(t, rwT(texts.Get("texts", "a")), "", false, nil)
	})
}

// rwCause is an error to be found with errors.As.
type rwCause struct{ code int }

func (c *rwCause) Error() string { return "email required" }

func TestErrors(t *testing.T) {
	opts := zestor.StoreOptions[string]{ValidateFns: map[string]zestor.ValidateFunc[string]{"users": func(v string) error { return &rwCause{len(v)} }}}
	rwWriters(t, "an error names operation, kind and key, and wraps its cause", opts, nil, func(t *testing.T, rw zestor.ReadWriter[string]) {
		for _, c := range rwWrites(rw)[:4] {
			err := c.do("users", "alice")
			rwNames(t, c.op, "users/alice", err)
			var cause *rwCause
			if c.op == "SetFn" {
				rwIs(t, err, zestor.ErrKeyNotFound)
			} else if !errors.As(err, &cause) || cause.code != 1 || !strings.HasSuffix(err.Error(), ": email required") {
				t.Errorf("%s: %v", c.op, err)
			}
		}
		if err := rwErr(rw.Set("users", "alice", "")); err.Error() != "zestor: set users/alice: email required" {
			t.Error(err)
		}
		rwNames(t, "SetIf", "other/alice", rwErr(rw.SetIf("other", "alice", "", 1)))
		rwNames(t, "SetFn", "other/alice", rwErr(rw.SetFn("other", "alice", func(string) (string, error) { return "", nil })))
		for _, c := range append(rwReads(rw), rwWrites(rw)...) {
			if c.names > 0 {
				rwIs(t, c.do("", ""), zestor.ErrKindRequired)
				rwNames(t, c.op, "", c.do("", "alice"))
			}
			if c.names > 1 {
				rwIs(t, c.do("users", ""), zestor.ErrKeyRequired)
				rwNames(t, c.op, "users", c.do("users", ""))
			}
		}
	})
}

func rwNames(t testing.TB, op, name string, err error) {
	t.Helper()
	text := fmt.Sprint(err)
	if !strings.HasPrefix(text, "zestor: ") || !strings.Contains(text, name) ||
		!strings.Contains(strings.ReplaceAll(strings.ToLower(text), " ", ""), strings.ToLower(op)) {
		t.Errorf("%q does not name %s %s", text, op, name)
	}
}

// heldContext has not ended, but takes its time to say so.
type heldContext struct {
	context.Context
	asked, release chan struct{}
}

func (c heldContext) Err() error {
	select {
	case <-c.asked:
	default:
		close(c.asked)
	}
	<-c.release
	return nil
}

// Close waits for the Scan, whose body waits for the watch.
func TestCloseEndsAWatchThatBeginsMeanwhile(t *testing.T) {
	each(t, func(t *testing.T, s zestor.Store[string]) {
		watchSet(t, s, "k", "a", "1")
		ctx := heldContext{context.Background(), make(chan struct{}), make(chan struct{})}
		var group sync.WaitGroup
		group.Go(func() {
			for range s.Scan("k", zestor.Range{}) {
				events, err := s.Watch(ctx, "k")
				must(err)
				for ev := range events {
					t.Errorf("%v", ev)
				}
			}
		})
		<-ctx.asked
		group.Go(func() { must(s.Close()) })
		for {
			if _, err := s.Count("k"); errors.Is(err, zestor.ErrClosed) {
				break // Close waits for the call of Watch
			}
			runtime.Gosched()
		}
		close(ctx.release)
		fileSoon(t, func() error { group.Wait(); return nil })
	})
}

func TestClose(t *testing.T) {
	rwEach(t, "every call on a closed store is ErrClosed", func(t *testing.T, s zestor.Store[string]) {
		check(t, s.SetMany("k", map[string]string{"a": ""}))
		kept := s.Scan("k", zestor.Range{})
		watch := watchOn(t, s, "k")
		check(t, s.Close())
		check(t, s.Close())
		if ev, ok := <-watch; ok {
			t.Errorf("the watch goes on: %v", ev)
		}
		for _, c := range append(append(rwReads(s), rwWrites(s)...), []rwCall{
			{"View", 0, func(_, _ string) error { return s.View(func(zestor.Reader[string]) error { panic("called") }) }},
			{"Update", 0, func(_, _ string) error { return s.Update(func(zestor.ReadWriter[string]) error { panic("called") }) }},
			{"Watch", 1, func(kind, _ string) error { return rwErr(s.Watch(t.Context(), kind)) }},
			{"Scan", 0, func(_, _ string) error { return rwLast(kept) }},
		}...) {
			for _, kind := range []string{"k", ""} { // checked before the kind
				err := c.do(kind, map[string]string{"k": "a"}[kind])
				rwIs(t, err, zestor.ErrClosed)
				rwNames(t, c.op, "", err)
			}
		}
	})
	rwEach(t, "every watch has ended when Close returns", func(t *testing.T, s zestor.Store[string]) {
		var watches []<-chan watchEvent
		for range 1000 {
			watches = append(watches, watchOn(t, s, "k"))
		}
		check(t, s.Close())
		for _, ch := range watches {
			select {
			case ev, ok := <-ch:
				if ok {
					t.Fatalf("%v", ev)
				}
			default:
				t.Fatal("a channel is open")
			}
		}
	})
	// Each call has two goroutines close the store, and goes on using it.
	for name, call := range map[string]func(t *testing.T, s zestor.Store[string], closing, ending func()){
		"Scan": func(t *testing.T, s zestor.Store[string], closing, ending func()) {
			n := 0
			for _, err := range s.Scan("k", zestor.Range{}) {
				check(t, err)
				if n++; n == 3 {
					ending()
				}
				if n > 1 {
					continue
				}
				closing()
				for i := 0; i < 5000; i++ { // the body may call the store
					if err := rwErr(s.Get("k", "a")); err != nil {
						rwIs(t, err, zestor.ErrClosed)
						break
					}
					runtime.Gosched()
				}
				if err := s.View(func(tx zestor.Reader[string]) error { return rwErr(tx.Get("k", "a")) }); err != nil {
					rwIs(t, err, zestor.ErrClosed)
				}
			}
			rwEq(t, rwT(n), 3)
		},
		"List": func(t *testing.T, s zestor.Store[string], closing, ending func()) {
			n := 0
			s.List("k", func(string, string) bool {
				if n++; n == 1 {
					closing()
					for range 1000 {
						runtime.Gosched()
					}
				}
				if n == 3 {
					ending()
				}
				return true
			})
		},
		"View": func(t *testing.T, s zestor.Store[string], closing, ending func()) {
			rwView(t, s, func(tx zestor.Reader[string]) {
				closing()
				for range 1000 {
					rwEq(t, rwT(tx.Get("k", "a")), "", true, nil)
					runtime.Gosched()
				}
				ending()
			})
		},
		"Update": func(t *testing.T, s zestor.Store[string], closing, ending func()) {
			rwUpdate(t, s, func(tx zestor.ReadWriter[string]) {
				closing()
				for i := range 1000 {
					rwEq(t, rwT(tx.Set("k", "a", fmt.Sprint(i))), zestor.SetUpdated, nil)
					runtime.Gosched()
				}
				ending()
			})
		},
	} {
		rwEach(t, "Close waits for calls under way/"+name, func(t *testing.T, s zestor.Store[string]) {
			check(t, s.SetMany("k", map[string]string{"a": "", "b": "", "c": ""}))
			var done atomic.Bool
			var wg sync.WaitGroup
			call(t, s, func() {
				for range 2 {
					wg.Go(func() {
						if err := s.Close(); err != nil || !done.Load() {
							t.Errorf("Close returned %v before the call under way", err)
						}
					})
				}
				runtime.Gosched()
			}, func() { done.Store(true) })
			wg.Wait()
		})
	}
}

func TestConcurrency(t *testing.T) {
	const goroutines = 8
	crowd := func(f func(g int)) {
		var wg sync.WaitGroup
		for g := range goroutines {
			wg.Go(func() { f(g) })
		}
		wg.Wait()
	}
	t.Run("counters are exact", func(t *testing.T) {
		each(t, func(t *testing.T, s zestor.Store[int]) {
			const rounds = 10
			check(t, s.SetMany("n", map[string]int{"fn": 0, "if": 0}))
			crowd(func(g int) {
				for range rounds {
					rwEq(t, rwT(s.SetFn("n", "fn", func(v int) (int, error) { return v + 1, nil })), true, nil)
					for range 1000 { // lost races
						e, _, err := s.GetEntry("n", "if")
						check(t, err)
						if _, err = s.SetIf("n", "if", e.Value+1, e.Revision); err == nil {
							break
						}
						rwIs(t, err, zestor.ErrConflict)
					}
					check(t, s.Update(func(tx zestor.ReadWriter[int]) error {
						for _, key := range []string{"tx", "tx2"} {
							v, _, err := tx.Get("n", key)
							if err != nil {
								return err
							}
							tx.Set("n", key, v+1)
						}
						return nil
					}))
					rwView(t, s, func(tx zestor.Reader[int]) { rwEq(t, rwT(tx.Get("n", "tx")), rwT(tx.Get("n", "tx2"))...) }) // both or neither
				}
			})
			const n = goroutines * rounds
			rwEq(t, rwT(s.List("n")), map[string]int{"fn": n, "if": n, "tx": n, "tx2": n}, nil)
			rwEq(t, rwT(s.Revision()), int64(2+4*n), nil)
			rwEq(t, rwT(rwEntry(t, s, "n", "tx").Version), int64(n))
		})
	})
	t.Run("every caller gets its own result", func(t *testing.T) {
		each(t, func(t *testing.T, s zestor.Store[string]) {
			events := watchOn(t, s, "k")
			var created, deleted, won atomic.Int32
			crowd(func(g int) {
				key := fmt.Sprint("own", g)
				for i := range 5 {
					rwEq(t, rwT(s.Set("k", key, "1")), zestor.SetCreated, nil)
					rwEq(t, rwT(s.Set("k", key, "1")), zestor.SetUnchanged, nil)
					rwEq(t, rwT(s.Set("k", key, key)), zestor.SetUpdated, nil)
					e := rwEntry(t, s, "k", key)
					rwEq(t, rwT(e.Value, e.Version), key, int64(2))
					rwIs(t, rwErr(s.SetIf("k", key, "no", e.Revision+1)), zestor.ErrConflict)
					revision, err := s.SetIf("k", key, "3", e.Revision)
					check(t, err)
					rwEq(t, rwT(rwEntry(t, s, "k", key)), zestor.Entry[string]{Kind: "k", Key: key, Value: "3", Version: 3, Revision: revision})
					rwEq(t, rwT(s.Delete("k", key)), true, "3", nil)
					rwEq(t, rwT(s.Delete("k", key)), false, "", nil)
					// One of all who want it gets it.
					shared := fmt.Sprint("shared", i)
					if result, err := s.Set("k", shared, "x"); err != nil {
						t.Error(err)
					} else if result == zestor.SetCreated {
						created.Add(1)
					}
					if err := rwErr(s.SetIf("l", shared, key, 0)); err == nil {
						won.Add(1)
					} else {
						rwIs(t, err, zestor.ErrConflict)
					}
				}
			})
			crowd(func(int) {
				for i := range 5 {
					if existed, prev, err := s.Delete("k", fmt.Sprint("shared", i)); existed {
						deleted.Add(1)
						rwEq(t, rwT(prev, err), "x", nil)
					}
				}
			})
			rwEq(t, rwT(created.Load(), won.Load(), deleted.Load()), int32(5), int32(5), int32(5))
			const changes = goroutines*5*4 + 5 + 5 + 5
			rwEq(t, rwT(s.Revision()), int64(changes), nil)
			last := int64(0)
			for range changes - 5 { // those of kind k
				ev := <-events
				if ev.Revision <= last {
					t.Fatalf("revision %d after %d", ev.Revision, last)
				}
				last = ev.Revision
			}
			rwEq(t, rwT(s.Keys("k")), []string{}, nil)
		})
	})
}

func TestHostileInput(t *testing.T) {
	names := []string{"\x00", "a", "a\x00", "a\x00b", "'", `"; DROP TABLE zestor_kv; --`, "%", "_", "a%", "a_", "?1", ":x", "\n", " ", "A",
		"\xff", "\xff\xff", "a\xff", "a\xff\xff", "\xc3\x28", "\xed\xa0\x80", "é", "e\u0301", "\U0010ffff", "../x", "*", "[a]", "1", "1.0", "0x1", "NULL"}
	rwEach(t, "names are found exactly", func(t *testing.T, s zestor.Store[string]) {
		want := map[string]map[string]string{}
		for i, name := range names {
			want[name] = map[string]string{}
			for _, key := range append([]string{names[(i+1)%len(names)]}, names[i:]...) {
				want[name][key] = name + "|" + strings.ToValidUTF8(key, "?")
				want[name][key] = strings.ToValidUTF8(want[name][key], "?")
			}
			check(t, s.SetMany(name, want[name]))
		}
		rwEq(t, rwT(s.GetAll()), want, nil)
		for i, name := range names {
			keys := slices.Sorted(maps.Keys(want[name]))
			rwEq(t, rwT(s.Keys(name)), keys, nil)
			rwEq(t, rwT(s.Count(name)), len(keys), nil)
			rwEq(t, rwT(s.Get(name, names[(i+2)%len(names)])), want[name][names[(i+2)%len(names)]], i+2 < len(names), nil)
			rwEq(t, rwT(s.Set(name, name, "new")), zestor.SetUpdated, nil)
			rwEq(t, rwT(s.SetFn(name, name, func(v string) (string, error) { return v + "er", nil })), true, nil)
			e := rwEntry(t, s, name, name)
			rwEq(t, rwT(e.Kind, e.Key, e.Value, e.Version), name, name, "newer", int64(3))
			rwEq(t, rwT(s.SetIf(name, name, "newest", e.Revision)), e.Revision+1, nil)
			rwEq(t, rwT(s.Delete(name, name)), true, "newest", nil)
			delete(want[name], name)
			if len(want[name]) == 0 {
				delete(want, name)
			}
		}
		rwEq(t, rwT(s.GetAll()), want, nil)
	})
	rwEach(t, "prefixes are found exactly", func(t *testing.T, s zestor.Store[string]) {
		rwUpdate(t, s, func(tx zestor.ReadWriter[string]) {
			for _, name := range names {
				rwEq(t, rwT(tx.Set("k", name, "")), zestor.SetCreated, nil)
			}
		})
		prefixes := append([]string{"\xff\xff\xff", "b"}, names...)
		live := map[string]<-chan zestor.Event[string]{}
		for _, prefix := range prefixes {
			want := rwRange(names, zestor.Range{Prefix: prefix})
			got := []string{}
			for e, err := range s.Scan("k", zestor.Range{Prefix: prefix}) {
				check(t, err)
				got = append(got, e.Key)
			}
			rwEq(t, rwT(got), want)
			events := watchOn(t, s, "k", zestor.WithPrefix(prefix), zestor.WithInitialReplay())
			got = []string{}
			for ev := <-events; ev.Type != zestor.EventSynced; ev = <-events {
				got = append(got, ev.Key)
			}
			rwEq(t, rwT(got), want)
			live[prefix] = events
		}
		rwUpdate(t, s, func(tx zestor.ReadWriter[string]) {
			for _, name := range slices.Sorted(slices.Values(names)) {
				tx.Set("k", name, "new")
			}
			for _, prefix := range prefixes { // the last that each of them lets through
				tx.Delete("k", prefix)
				tx.Set("k", prefix, "end")
			}
		})
		for prefix, events := range live {
			got := []string{}
			for ev := <-events; ev.Value != "end" || ev.Key != prefix; ev = <-events {
				if ev.Type == zestor.EventUpdate {
					got = append(got, ev.Key)
				} else if !strings.HasPrefix(ev.Key, prefix) {
					t.Errorf("%q was let through %q", ev.Key, prefix)
				}
			}
			rwEq(t, rwT(got), rwRange(names, zestor.Range{Prefix: prefix}))
		}
	})
	rwEachWith(t, "names of a megabyte and values of many", zestor.StoreOptions[string]{}, rwText, func(t *testing.T, s zestor.Store[string]) {
		big := strings.Repeat("\xff'%\x00", 1<<18)
		events := watchOn(t, s, big, zestor.WithPrefix(big))
		check(t, s.SetMany(big, map[string]string{big + "1": "1", big[1:]: "2"}))
		ev := <-events
		rwEq(t, rwT(ev.Key == big+"1", ev.Kind == big, ev.Value), true, true, "1")
		rwEq(t, rwT(s.Keys(big)), []string{big[1:], big + "1"}, nil)
		rwEq(t, rwT(rwScan(t, s, big, zestor.Range{Prefix: big})), []string{big + "1=1"})
		rwEq(t, rwT(rwScan(t, s, big, zestor.Range{After: big[1:]})), []string{big + "1=1"})
		rwEq(t, rwT(s.Delete(big, big+"1")), true, "1", nil)
		size := fileMore(20<<20, 100<<20)
		value := strings.Repeat("0123456789abcdef", size/16)
		rwEq(t, rwT(s.Set("k", "big", value)), zestor.SetCreated, nil)
		rwEq(t, rwT(s.Set("k", "big", value)), zestor.SetUnchanged, nil)
		got, ok, err := s.Get("k", "big")
		rwEq(t, rwT(got == value, ok, err), true, true, nil)
	})
}

// Watching.

type (
	watchStore = zestor.Store[string]
	watchEvent = zestor.Event[string]
)

func watchOn[T any](t testing.TB, s zestor.Store[T], kind string, opts ...zestor.WatchOption) <-chan zestor.Event[T] {
	t.Helper()
	ch, err := s.Watch(t.Context(), kind, opts...)
	check(t, err)
	return ch
}

// watchNext is the next event of a watch; ok is false at its end.
func watchNext[T any](t testing.TB, ch <-chan zestor.Event[T]) (ev zestor.Event[T], ok bool) {
	t.Helper()
	select {
	case ev, ok = <-ch:
	case <-time.After(fileDeadline):
		t.Fatal("no event, and the channel is open")
	}
	return ev, ok
}

// watchText is an event as the tests write it: "create a=1 v1 r1", "synced r1".
func watchText(ev watchEvent) string {
	text := fmt.Sprintf("%s %s=%s v%d r%d", ev.Type, ev.Key, ev.Value, ev.Version, ev.Revision)
	if ev.Type == zestor.EventSynced || ev.Type == zestor.EventError {
		text = strings.Replace(text, " = v0", "", 1)
	}
	switch {
	case ev.Err == zestor.ErrWatchOverflow: // as it is
		text += " overflow"
	case ev.Err == zestor.ErrCompacted:
		text += " compacted"
	case ev.Err != nil:
		text += " failed"
	}
	return text
}

// watchWant receives exactly these events; "closed" is the end of the channel.
func watchWant(t testing.TB, ch <-chan watchEvent, want ...string) {
	t.Helper()
	for i, want := range want {
		got := "closed"
		if ev, ok := watchNext(t, ch); ok {
			got = watchText(ev)
		}
		if got != want {
			t.Fatalf("event %d is %q, want %q", i, got, want)
		}
	}
}

// watchNone fails if an event is on its way. It is for bubbles.
func watchNone(t testing.TB, ch <-chan watchEvent) {
	t.Helper()
	synctest.Wait()
	select {
	case ev, ok := <-ch:
		t.Fatalf("unexpected event %q, open %v", watchText(ev), ok)
	default:
	}
}

// watchIdle fails if the library has a goroutine. It is for bubbles.
func watchIdle(t testing.TB) {
	t.Helper()
	watchNoGoroutine(t, "zestor-dev/zestor.")
}

// watchNoGoroutine waits until all is quiet and fails if a goroutine runs a function of that name.
func watchNoGoroutine(t testing.TB, name string) {
	t.Helper()
	synctest.Wait()
	all := make([]byte, 1<<20)
	for g := range strings.SplitSeq(string(all[:runtime.Stack(all, true)]), "\n\n") {
		if strings.Contains(g, name) {
			t.Fatalf("a goroutine is left:\n%s", g)
		}
	}
}

func watchUntil(t testing.TB, ch <-chan watchEvent, last func(watchEvent) bool) (events []watchEvent) {
	t.Helper()
	for {
		ev, ok := watchNext(t, ch)
		if !ok {
			t.Fatalf("the watch ended after %d events", len(events))
		}
		if events = append(events, ev); last(ev) {
			return events
		}
	}
}

func watchSet(t testing.TB, s watchStore, kind, key, value string) {
	t.Helper()
	check(t, rwErr(s.Set(kind, key, value)))
}

func watchRevision[T any](t testing.TB, s zestor.Reader[T]) int64 {
	t.Helper()
	r, err := s.Revision()
	check(t, err)
	return r
}

// watchFill makes n changes of a kind in one transaction and returns the
// texts of their events.
func watchFill(t testing.TB, s watchStore, kind string, n int) (texts []string) {
	t.Helper()
	r := watchRevision(t, s)
	values := map[string]string{}
	for i := range n {
		r++
		key := fmt.Sprintf("%06d.%d", r, i)
		values[key] = "x"
		texts = append(texts, fmt.Sprintf("create %s=x v1 r%d", key, r))
	}
	check(t, s.SetMany(kind, values))
	return texts
}

// watchAll runs n functions at once and waits for them.
func watchAll(t testing.TB, n int, f func(i int) error) {
	t.Helper()
	errs := make(chan error, n)
	for i := range n {
		go func() { errs <- f(i) }()
	}
	for range n {
		select {
		case err := <-errs:
			check(t, err)
		case <-time.After(fileDeadline):
			t.Fatal("stuck")
		}
	}
}

func watchIs(t *testing.T, kind string) bool { return strings.HasSuffix(t.Name(), "/"+kind) }

func TestWatch(t *testing.T) {
	bubble := func(name string, f func(t *testing.T, s watchStore)) {
		t.Run(name, func(t *testing.T) { eachBubble(t, f) })
	}

	bubble("every change is an event and nothing else is", func(t *testing.T, s watchStore) {
		ch := watchOn(t, s, "k")
		for _, value := range []string{"1", "1", "", ""} {
			watchSet(t, s, "k", "a", value) // 1, 2
		}
		watchSet(t, s, "j", "a", "1")                                       // 3
		check(t, s.SetMany("k", map[string]string{"b": "1", "a": "2"}))     // 4, 5
		check(t, s.SetMany("k", map[string]string{"b": "1", "a": "3"}))     // 6
		same := func(v string) (string, error) { return v, nil }            //
		more := func(v string) (string, error) { return v + "+", nil }      //
		fail := func(v string) (string, error) { return "", os.ErrInvalid } //
		for _, fn := range []func(string) (string, error){same, more, fail} {
			s.SetFn("k", "a", fn) // 7
		}
		for _, r := range []int64{4, 5, 5, 0} {
			s.SetIf("k", "b", "2", r) // 8, at revision 5
		}
		s.SetIf("k", "c", "1", 0) // 9
		for range 2 {
			_, _, err := s.Delete("k", "a") // 10
			check(t, err)
		}
		watchSet(t, s, "k", "a", "4") // 11
		rolledBack := func(end func() error) {
			defer func() { recover() }()
			s.Update(func(tx zestor.ReadWriter[string]) error {
				tx.Set("k", "a", "no")
				tx.Delete("k", "b")
				return end()
			})
		}
		rolledBack(func() error { return os.ErrInvalid })
		rolledBack(func() error { panic("no") })
		done := make(chan bool)
		go func() {
			defer close(done)
			rolledBack(func() error { runtime.Goexit(); return nil })
		}()
		<-done
		check(t, s.Update(func(tx zestor.ReadWriter[string]) error {
			for _, value := range []string{"5", "6"} {
				tx.Set("k", "a", value) // 12, 13
			}
			tx.SetIf("k", "a", "no", 1)
			tx.SetFn("k", "none", same)
			tx.Delete("k", "b")   // 14
			tx.Set("j", "b", "1") // 15
			tx.Set("k", "b", "3") // 16
			return nil
		}))
		watchWant(t, ch, "create a=1 v1 r1", "update a= v2 r2", "update a=2 v3 r4", "create b=1 v1 r5", "update a=3 v4 r6",
			"update a=3+ v5 r7", "update b=2 v2 r8", "create c=1 v1 r9", "delete a=3+ v5 r10", "create a=4 v1 r11",
			"update a=5 v2 r12", "update a=6 v3 r13", "delete b=2 v2 r14", "create b=3 v1 r16")
		watchNone(t, ch)
	})

	bubble("an initial replay is entries in key order, then synced, then changes", func(t *testing.T, s watchStore) {
		for _, key := range []string{"b", "c", "a\xff", "a", "b"} {
			watchSet(t, s, "k", key, strconv.FormatInt(watchRevision(t, s), 10))
		}
		s.Delete("k", "c")
		ch := watchOn(t, s, "k", zestor.WithInitialReplay())
		watchSet(t, s, "k", "a", "new")
		watchWant(t, ch, "create a=3 v1 r4", "create a\xff=2 v1 r3", "create b=4 v2 r5", "synced r6", "update a=new v2 r7")
		watchNone(t, ch)
		watchWant(t, watchOn(t, s, "none", zestor.WithInitialReplay()), "synced r7")
	})

	bubble("a watch without replay gets no synced and nothing old", func(t *testing.T, s watchStore) {
		watchFill(t, s, "k", 3)
		ch := watchOn(t, s, "k")
		watchNone(t, ch)
		watchWant(t, ch, watchFill(t, s, "k", 1)...)
		watchNone(t, ch)
	})

	bubble("a replay never counts as falling behind", func(t *testing.T, s watchStore) {
		entries := watchFill(t, s, "k", 200)
		ch := watchOn(t, s, "k", zestor.WithInitialReplay(), zestor.WithBufferSize(3))
		synctest.Wait()
		live := watchFill(t, s, "k", 3) // undelivered beside the replay
		synctest.Wait()
		watchWant(t, ch, slices.Concat(entries, []string{"synced r200"}, live)...)
		watchNone(t, ch)
		if watchIs(t, "memory") {
			return
		}
		ch = watchOn(t, s, "k", zestor.WithSince(0), zestor.WithBufferSize(1))
		watchWant(t, ch, slices.Concat(entries, live, []string{"synced r203"}, watchFill(t, s, "k", 1))...)
	})

	bubble("filters leave prefixes and types, and synced passes them", func(t *testing.T, s watchStore) {
		watchSet(t, s, "k", "a/1", "1")
		watchSet(t, s, "k", "b/1", "1")
		initial := zestor.WithInitialReplay()
		prefix := watchOn(t, s, "k", initial, zestor.WithPrefix("a/"))
		creates := watchOn(t, s, "k", initial, zestor.WithEventTypes(zestor.EventCreate))
		changes := watchOn(t, s, "k", initial, zestor.WithEventTypes(zestor.EventDelete, zestor.EventUpdate))
		nothing := watchOn(t, s, "k", initial, zestor.WithEventTypes())
		both := watchOn(t, s, "k", zestor.WithPrefix("a"), zestor.WithEventTypes(zestor.EventDelete))
		watchSet(t, s, "k", "a/2", "1")
		watchSet(t, s, "k", "a", "1")
		watchSet(t, s, "k", "b/1", "2")
		s.Delete("k", "a/1")
		s.Delete("k", "b/1")
		watchWant(t, prefix, "create a/1=1 v1 r1", "synced r2", "create a/2=1 v1 r3", "delete a/1=1 v1 r6")
		watchWant(t, creates, "create a/1=1 v1 r1", "create b/1=1 v1 r2", "synced r2", "create a/2=1 v1 r3", "create a=1 v1 r4")
		watchWant(t, changes, "synced r2", "update b/1=2 v2 r5", "delete a/1=1 v1 r6", "delete b/1=2 v2 r7")
		watchWant(t, nothing, "synced r2")
		watchWant(t, both, "delete a/1=1 v1 r6")
		for _, ch := range []<-chan watchEvent{prefix, creates, changes, nothing, both} {
			watchNone(t, ch)
		}
		since := watchOn(t, s, "k", zestor.WithSince(7), zestor.WithPrefix("none"), zestor.WithEventTypes(zestor.EventDelete))
		watchWant(t, since, "synced r7")
	})

	bubble("n undelivered changes are held and one more overflows", func(t *testing.T, s watchStore) {
		for _, n := range []int{1, 2, 63, 64, 65, 66, 150} {
			kind := fmt.Sprint("k", n)
			ch := watchOn(t, s, kind, zestor.WithBufferSize(n))
			held := watchFill(t, s, kind, n)
			synctest.Wait()
			watchWant(t, ch, held[0])
			synctest.Wait()
			held = append(held[1:], watchFill(t, s, kind, 1)...) // room for one again
			synctest.Wait()
			watchWant(t, ch, held...)
			watchNone(t, ch)
			held = watchFill(t, s, kind, n)
			synctest.Wait()
			complete := watchRevision(t, s)
			watchFill(t, s, kind, 1) // too many
			synctest.Wait()
			watchWant(t, ch, held[0])
			synctest.Wait()
			watchFill(t, s, kind, 1) // too late
			watchWant(t, ch, append(held[1:], fmt.Sprintf("error r%d overflow", complete), "closed")...)

			ch = watchOn(t, s, kind, zestor.WithBufferSize(n))
			held = watchFill(t, s, kind, n+2)[:n] // of one transaction
			synctest.Wait()
			watchWant(t, ch, append(held, fmt.Sprintf("error r%d overflow", complete+2+int64(n)), "closed")...)
		}
	})

	bubble("what is filtered out does not count as undelivered", func(t *testing.T, s watchStore) {
		watchSet(t, s, "k", "b", "1")
		ch := watchOn(t, s, "k", zestor.WithBufferSize(1), zestor.WithPrefix("a"), zestor.WithEventTypes(zestor.EventCreate))
		watchSet(t, s, "k", "a", "1") // 2, held
		watchSet(t, s, "k", "b", "2") // 3
		watchSet(t, s, "k", "a", "2") // 4
		s.Delete("k", "a")            // 5
		watchFill(t, s, "j", 5)       // 10
		watchNone(t, make(chan watchEvent))
		watchWant(t, ch, "create a=1 v1 r2")
		watchFill(t, s, "j", 100)      // 110
		watchSet(t, s, "k", "a1", "1") // 111, held
		watchFill(t, s, "j", 9)        // 120
		watchSet(t, s, "k", "a2", "1") // 121
		synctest.Wait()
		watchWant(t, ch, "create a1=1 v1 r111")
		ev, _ := watchNext(t, ch)
		if !errors.Is(ev.Err, zestor.ErrWatchOverflow) || ev.Revision < 111 || ev.Revision > 120 {
			t.Fatalf("the end is %q", watchText(ev))
		}
		watchWant(t, ch, "closed")
		if !watchIs(t, "memory") {
			again := watchOn(t, s, "k", zestor.WithSince(ev.Revision), zestor.WithPrefix("a"))
			watchWant(t, again, "create a2=1 v1 r121", "synced r121")
		}
	})

	bubble("a replay goes on to synced while the watch overflows behind it", func(t *testing.T, s watchStore) {
		entries := watchFill(t, s, "k", 100)
		ch := watchOn(t, s, "k", zestor.WithInitialReplay(), zestor.WithBufferSize(2))
		synctest.Wait()
		live := watchFill(t, s, "k", 3)
		synctest.Wait()
		watchWant(t, ch, slices.Concat(entries, []string{"synced r100"}, live[:2], []string{"error r102 overflow", "closed"})...)
	})

	bubble("synced and error say where WithSince continues", func(t *testing.T, s watchStore) {
		old := watchFill(t, s, "k", 3)
		first := watchOn(t, s, "k", zestor.WithInitialReplay(), zestor.WithBufferSize(2))
		watchWant(t, first, append(old, "synced r3")...)
		rest := watchFill(t, s, "k", 5)
		synctest.Wait()
		watchWant(t, first, rest[0], rest[1], "error r5 overflow", "closed")
		for r, want := range map[int64][]string{3: rest, 5: rest[2:], 8: nil} {
			ch, err := s.Watch(t.Context(), "k", zestor.WithSince(r))
			if watchIs(t, "memory") && r != 8 {
				if !errors.Is(err, zestor.ErrCompacted) || ch != nil {
					t.Fatalf("WithSince(%d) gives %v", r, err)
				}
				continue
			}
			check(t, err)
			watchWant(t, ch, append(slices.Clone(want), "synced r8")...)
			watchNone(t, ch)
		}
	})

	bubble("writers never wait for a stuck consumer", func(t *testing.T, s watchStore) {
		watchFill(t, s, "k", 200)
		watchOn(t, s, "k", zestor.WithInitialReplay(), zestor.WithBufferSize(5)) // stuck in its replay
		watchOn(t, s, "k", zestor.WithBufferSize(100))
		watchOn(t, s, "k")
		good := watchOn(t, s, "k")
		for range 3 { // a writer that waits here is a deadlock in the bubble
			watchWant(t, good, watchFill(t, s, "k", 150)...)
		}
	})

	bubble("the channel closes when ctx ends", func(t *testing.T, s watchStore) {
		watchFill(t, s, "k", 200)
		for i := range 8 {
			ctx, cancel := context.WithCancel(t.Context())
			ch, err := s.Watch(ctx, "k", []zestor.WatchOption{
				nil, zestor.WithInitialReplay(), zestor.WithBufferSize(2), zestor.WithSince(watchRevision(t, s))}[i/2])
			check(t, err)
			watchFill(t, s, "k", i%2)
			synctest.Wait()
			cancel()
			synctest.Wait()
			watchFill(t, s, "k", 1)
			for ev := range ch { // what it still holds
				if ev.Type == zestor.EventError {
					t.Fatalf("the end is no error, but came %q", watchText(ev))
				}
			}
			watchIdle(t)
		}
	})

	bubble("the channel closes when the store does", func(t *testing.T, s watchStore) {
		watchFill(t, s, "k", 200)
		idle := watchOn(t, s, "none")
		full := watchOn(t, s, "k")
		over := watchOn(t, s, "k", zestor.WithBufferSize(1))
		replay := watchOn(t, s, "k", zestor.WithInitialReplay())
		watchFill(t, s, "k", 100)
		synctest.Wait()
		check(t, s.Close())
		watchWant(t, idle, "closed")
		for _, ch := range []<-chan watchEvent{full, over, replay} {
			for range ch {
			}
		}
		watchIdle(t)
		if _, err := s.Watch(t.Context(), "", zestor.WithBufferSize(0)); !errors.Is(err, zestor.ErrClosed) {
			t.Fatalf("Watch of a closed store: %v", err)
		}
	})

	bubble("Watch refuses what it can't do", func(t *testing.T, s watchStore) {
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		late, cancel := context.WithTimeout(t.Context(), 0)
		defer cancel()
		watchFill(t, s, "k", 2)
		for _, c := range []struct {
			name string
			ctx  context.Context
			kind string
			opts []zestor.WatchOption
			is   error // nil: any other
		}{
			{"no kind", t.Context(), "", nil, zestor.ErrKindRequired},
			{"ended", ended, "k", nil, context.Canceled},
			{"ended replay", ended, "k", []zestor.WatchOption{zestor.WithInitialReplay()}, context.Canceled},
			{"late", late, "k", nil, context.DeadlineExceeded},
			{"both", t.Context(), "k", []zestor.WatchOption{zestor.WithInitialReplay(), zestor.WithSince(2)}, nil},
			{"negative since", t.Context(), "k", []zestor.WatchOption{zestor.WithSince(-1)}, nil},
			{"no buffer", t.Context(), "k", []zestor.WatchOption{zestor.WithBufferSize(0)}, nil},
			{"negative buffer", t.Context(), "k", []zestor.WatchOption{zestor.WithBufferSize(-5)}, nil},
			{"type synced", t.Context(), "k", []zestor.WatchOption{zestor.WithEventTypes(zestor.EventSynced)}, nil},
			{"type error", t.Context(), "k", []zestor.WatchOption{zestor.WithEventTypes(zestor.EventCreate, zestor.EventError)}, nil},
			{"type x", t.Context(), "k", []zestor.WatchOption{zestor.WithEventTypes("x")}, nil},
			{"last of repeated", t.Context(), "k", []zestor.WatchOption{zestor.WithBufferSize(1), nil, zestor.WithBufferSize(0)}, nil},
			{"beyond", t.Context(), "k", []zestor.WatchOption{zestor.WithSince(3)}, zestor.ErrCompacted},
		} {
			ch, err := s.Watch(c.ctx, c.kind, c.opts...)
			switch {
			case err == nil || ch != nil || c.is != nil && !errors.Is(err, c.is):
				t.Errorf("%s: %v", c.name, err)
			case c.ctx.Err() != nil && err != c.ctx.Err():
				t.Errorf("%s: %q is not ctx.Err()", c.name, err)
			case c.ctx.Err() == nil && !strings.HasPrefix(err.Error(), "zestor: watch "+c.kind):
				t.Errorf("%s: %q does not name the operation", c.name, err)
			case c.is == nil && errors.Is(err, zestor.ErrCompacted):
				t.Errorf("%s is no ErrCompacted", c.name)
			}
		}
		watchIdle(t)
		ch := watchOn(t, s, "k", nil, zestor.WithBufferSize(0), zestor.WithSince(-1), zestor.WithEventTypes("x"), zestor.WithPrefix("none"),
			nil, zestor.WithBufferSize(9), zestor.WithSince(2), zestor.WithEventTypes(zestor.EventCreate), zestor.WithPrefix(""))
		watchWant(t, ch, append([]string{"synced r2"}, watchFill(t, s, "k", 9)...)...) // the last holds
	})

	bubble("WithSince is exact at every revision", func(t *testing.T, s watchStore) {
		all := watchOn(t, s, "k")
		check(t, watchWrite(s, "w", 20))
		newest := watchRevision(t, s)
		watchSet(t, s, "k", "end", "")
		events := watchUntil(t, all, func(ev watchEvent) bool { return ev.Key == "end" })
		for r := range newest + 3 {
			ch, err := s.Watch(t.Context(), "k", zestor.WithSince(r))
			if r > newest+1 || watchIs(t, "memory") && r != newest+1 {
				if !errors.Is(err, zestor.ErrCompacted) {
					t.Fatalf("WithSince(%d) of %d: %v", r, newest+1, err)
				}
				continue
			}
			check(t, err)
			for _, ev := range events {
				if ev.Revision > r {
					watchWant(t, ch, watchText(ev))
				}
			}
			watchWant(t, ch, fmt.Sprintf("synced r%d", newest+1))
			watchNone(t, ch)
		}
	})

}

// watchWrite makes changes of all sorts in the kinds k and j. Each value names
// its transaction.
func watchWrite(s watchStore, who string, rounds int) error {
	h := fnv.New64()
	h.Write([]byte(who))
	rnd := rand.New(rand.NewPCG(h.Sum64(), 1))
	for i := range rounds {
		v := func(n int) string { return fmt.Sprintf("%s.%d.%d", who, i, n) }
		key := fmt.Sprint("s", rnd.IntN(6))
		var err error
		switch rnd.IntN(5) {
		case 0:
			_, err = s.Set("k", key, v(0))
		case 1:
			err = s.SetMany("k", map[string]string{"s1": v(0), "s3": v(1), who: v(2)})
		case 2:
			if _, err = s.SetFn("k", key, func(string) (string, error) { return v(0), nil }); errors.Is(err, zestor.ErrKeyNotFound) {
				err = nil
			}
		case 3:
			_, _, err = s.Delete("k", key)
		case 4:
			err = s.Update(func(tx zestor.ReadWriter[string]) error {
				tx.Set("k", key, v(0))
				tx.Set("j", key, v(1))
				tx.Delete("k", "s0")
				tx.Set("k", "s5", v(2))
				_, err := tx.Set("j", who, v(3))
				return err
			})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// watchVerify ends what watchWrite began: the watches of k and j, which began
// with the file, together saw every change once, in order, each transaction in
// one piece, and their events make up the state of the store. It returns them.
func watchVerify(t *testing.T, s watchStore, k, j <-chan watchEvent) (events []watchEvent) {
	t.Helper()
	for kind, ch := range map[string]<-chan watchEvent{"k": k, "j": j} {
		watchSet(t, s, kind, "end", "")
		before := int64(0)
		for _, ev := range watchUntil(t, ch, func(ev watchEvent) bool { return ev.Key == "end" }) {
			if ev.Type == zestor.EventSynced {
				continue
			}
			if ev.Kind != kind || ev.Revision <= before || ev.Err != nil {
				t.Fatalf("after %d came %+v", before, ev)
			}
			before = ev.Revision
			events = append(events, ev)
		}
	}
	slices.SortFunc(events, func(a, b watchEvent) int { return int(a.Revision - b.Revision) })
	state := map[string]map[string]watchEvent{"k": {}, "j": {}}
	last := map[string]int{} // of a transaction
	tag := func(ev watchEvent) string { return ev.Value[:max(0, strings.LastIndexByte(ev.Value, '.'))] }
	for i, ev := range events {
		if ev.Revision != int64(i+1) {
			t.Fatalf("revision %d is at place %d", ev.Revision, i+1)
		}
		old, exists := state[ev.Kind][ev.Key]
		switch {
		case ev.Type == zestor.EventCreate && !exists && ev.Version == 1:
		case ev.Type == zestor.EventUpdate && exists && ev.Version == old.Version+1 && ev.Value != old.Value:
		case ev.Type == zestor.EventDelete && exists && ev.Version == old.Version && ev.Value == old.Value:
			delete(state[ev.Kind], ev.Key)
			continue
		default:
			t.Fatalf("%q cannot follow %q", watchText(ev), watchText(old))
		}
		state[ev.Kind][ev.Key] = ev
		if n, seen := last[tag(ev)]; seen && slices.ContainsFunc(events[n:i], func(other watchEvent) bool {
			return other.Type != zestor.EventDelete && tag(other) != tag(ev)
		}) {
			t.Fatalf("the transaction of %q is in pieces", watchText(ev))
		}
		last[tag(ev)] = i
	}
	if r := watchRevision(t, s); r != int64(len(events)) {
		t.Fatalf("%d events, and the revision is %d", len(events), r)
	}
	for kind, keys := range state {
		entries, err := s.Values(kind)
		check(t, err)
		for _, e := range entries {
			if ev := keys[e.Key]; ev.Value != e.Value || ev.Version != e.Version || ev.Revision != e.Revision {
				t.Fatalf("the store has %+v, the events %+v", e, ev)
			}
		}
		if len(entries) != len(keys) {
			t.Fatalf("the store has %d keys, the events %d", len(entries), len(keys))
		}
	}
	return events
}

// watchPiece watches k for a while, and returns what it saw and the revision
// after which it must have seen everything; -1: it saw nothing that matters.
func watchPiece(t testing.TB, s watchStore, how int) (replay, events []watchEvent, after int64, err error) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	now, err := s.Revision()
	if err != nil {
		return nil, nil, -1, err
	}
	since := max(0, now-rand.Int64N(20))
	ch, err := s.Watch(ctx, "k", [][]zestor.WatchOption{nil, {zestor.WithInitialReplay()}, {zestor.WithSince(since)}}[how]...)
	switch {
	case errors.Is(err, zestor.ErrCompacted) && how == 2 || err != nil && err == ctx.Err():
		return nil, nil, -1, nil
	case err != nil:
		return nil, nil, -1, err
	}
	switch how {
	case 0:
		after, err = s.Revision()
	case 1:
		after = -1
	case 2:
		after = since
	}
	for ev := range ch {
		if now, _ = s.Revision(); now < ev.Revision {
			return nil, nil, -1, fmt.Errorf("%q came before its commit", watchText(ev))
		}
		switch {
		case how == 1 && ev.Type == zestor.EventSynced:
			after = ev.Revision
		case how == 1 && after < 0:
			replay = append(replay, ev)
		case ev.Type != zestor.EventSynced && ev.Revision > after:
			events = append(events, ev)
		}
		if len(events) > 8 {
			cancel()
		}
	}
	return replay, events, after, err
}

// watchStorm watches k and j of an empty store from the start, and k again
// and again in pieces, while n writers write, and verifies what they all saw.
func watchStorm(t *testing.T, s watchStore, n int, write func(i int) error, meanwhile func() error) {
	t.Helper()
	whole := zestor.WithBufferSize(1 << 24) // read at the end
	j, k := watchOn(t, s, "j", whole), watchOn(t, s, "k", whole, zestor.WithInitialReplay())
	var done atomic.Bool
	var mu sync.Mutex
	var checks []func(all []watchEvent) error // protected by mu
	seen := 0                                 // the same
	look := func(g int) error {
		for how := g % 3; !done.Load(); how = (how + 1) % 3 {
			replay, events, after, err := watchPiece(t, s, how)
			if err != nil {
				return err
			}
			if after < 0 {
				continue
			}
			mu.Lock()
			seen += len(events)
			checks = append(checks, func(all []watchEvent) error {
				state := map[string]watchEvent{}
				for _, ev := range all {
					if ev.Kind != "k" {
						continue
					}
					if ev.Revision <= after {
						if state[ev.Key] = ev; ev.Type == zestor.EventDelete {
							delete(state, ev.Key)
						}
					} else if len(events) > 0 {
						if events[0] != ev {
							return fmt.Errorf("watch %d after %d saw %q, want %q", how, after, watchText(events[0]), watchText(ev))
						}
						events = events[1:]
					}
				}
				for _, ev := range replay {
					if was := state[ev.Key]; was.Value != ev.Value || was.Revision != ev.Revision || was.Version != ev.Version {
						return fmt.Errorf("the replay at %d has %q for %q", after, watchText(ev), watchText(was))
					}
				}
				if how == 1 && len(replay) != len(state) {
					return fmt.Errorf("the replay at %d has %d entries of %d", after, len(replay), len(state))
				}
				return nil
			})
			mu.Unlock()
		}
		return nil
	}
	var writing sync.WaitGroup
	writing.Add(n)
	start := time.Now()
	watchAll(t, n+6, func(i int) error {
		switch {
		case i < n:
			defer writing.Done()
			for enough := false; !enough; i += n { // on one processor the first may be over before anybody looks
				if err := write(i); err != nil {
					return err
				}
				mu.Lock()
				enough = seen > 0 || time.Since(start) > fileDeadline
				mu.Unlock()
			}
		case i < n+4:
			return look(i)
		case i == n+4:
			writing.Wait()
			done.Store(true)
		case meanwhile != nil:
			for first := true; first || !done.Load(); first = false {
				if err := meanwhile(); err != nil {
					return err
				}
			}
		}
		return nil
	})
	all := watchVerify(t, s, k, j)
	for _, c := range checks {
		check(t, c(all))
	}
	if t.Logf("%d changes, %d pieces with %d events", len(all), len(checks), seen); seen == 0 {
		t.Fatal("no piece saw an event")
	}
}

func TestWatchManyWriters(t *testing.T) {
	each(t, func(t *testing.T, s watchStore) {
		rounds := map[bool]int{false: 60, true: 600}[watchIs(t, "memory") || watchIs(t, "sqlite-private")]
		if long {
			rounds *= 20
		}
		watchStorm(t, s, 4, func(i int) error { return watchWrite(s, fmt.Sprint("w", i), rounds) }, nil)
	})
}

// Replay and live meet exactly also where the store reads its log for others.
func TestWatchBeginsWhileOthersWatch(t *testing.T) {
	s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: "file:" + filepath.Join(t.TempDir(), "test.db") + "?_synchronous=OFF"})
	watchOn(t, s, "k")
	var left atomic.Int64
	left.Store(8)
	watchAll(t, 9, func(g int) error {
		for i := 0; g == 8 && left.Load() > 0; i++ {
			if _, err := s.Set("k", "a", strconv.Itoa(i)); err != nil {
				return err
			}
		}
		defer left.Add(-1)
		for i := 0; g < 8 && i < map[bool]int{false: 150, true: 5000}[long]; i++ {
			since, err := s.Revision()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(t.Context(), fileDeadline)
			defer cancel()
			ch, err := s.Watch(ctx, "k", zestor.WithSince(since))
			if err != nil {
				return err
			}
			for want := since + 1; want < since+4; {
				if ev := <-ch; ev.Revision == want {
					want++
				} else if ev.Type != zestor.EventSynced {
					return fmt.Errorf("after %d came %q, want revision %d", since, watchText(ev), want)
				}
			}
			cancel()
		}
		return nil
	})
}

// A consumer that takes each change before the next one is never behind.
func TestWatchOfOneIsNotBehind(t *testing.T) {
	each(t, func(t *testing.T, s watchStore) {
		for n, rounds := range map[int]int{1: 5000, 65: 1000} {
			if !watchIs(t, "memory") {
				rounds /= 20
			}
			ch := watchOn(t, s, "k", zestor.WithBufferSize(n))
			events := watchFill(t, s, "k", n-1)
			for range rounds {
				events = append(events, watchFill(t, s, "k", 1)...)
				watchWant(t, ch, events[0])
				events = events[1:]
			}
		}
	})
}

// The documented loop rebuilds the state, however often it overflows.
func TestWatchAgainAfterOverflow(t *testing.T) {
	each(t, func(t *testing.T, s watchStore) {
		written := make(chan error, 1)
		go func() {
			err := watchWrite(s, "w", 100)
			if err == nil {
				_, err = s.Set("k", "~end", "")
			}
			written <- err
		}()
		state, since, overflows := map[string]string{}, int64(-1), 0
		for state["~end"] = "no"; state["~end"] != ""; {
			opts := []zestor.WatchOption{zestor.WithBufferSize(2), zestor.WithSince(since)}
			if since < 0 {
				state = map[string]string{"~end": "no"}
				opts[1] = zestor.WithInitialReplay()
			}
			ch, err := s.Watch(t.Context(), "k", opts...)
			if since = -1; errors.Is(err, zestor.ErrCompacted) {
				continue
			}
			check(t, err)
			for open := true; open && state["~end"] != ""; {
				var ev watchEvent
				switch ev, open = watchNext(t, ch); ev.Type {
				case zestor.EventError:
					since = ev.Revision
					overflows++
				case zestor.EventDelete:
					delete(state, ev.Key)
				case zestor.EventCreate, zestor.EventUpdate:
					state[ev.Key] = ev.Value
				}
				time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond) // a slow consumer
			}
		}
		check(t, <-written)
		list, err := s.List("k")
		check(t, err)
		if !reflect.DeepEqual(list, state) {
			t.Fatalf("after %d overflows %v, the store has %v", overflows, state, list)
		}
	})
}

// EventSynced and EventError have no value, not even one that a codec makes of nothing.
func TestWatchEndHasNoValue(t *testing.T) {
	codec := zestor.NewCodec(json.Marshal, func(_ []byte, v any) error {
		*v.(*string) = "decoded"
		return nil
	})
	s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: ":memory:", Codec: codec})
	ch := watchOn(t, s, "k", zestor.WithSince(0), zestor.WithBufferSize(1))
	watchWant(t, ch, "synced r0")
	watchFill(t, s, "k", 10)
	for {
		ev, ok := watchNext(t, ch)
		if !ok {
			t.Fatal("no overflow")
		}
		if value := map[bool]string{true: "decoded"}[ev.Type == zestor.EventCreate]; ev.Value != value {
			t.Fatalf("got %+v", ev)
		}
		if ev.Type == zestor.EventError {
			break
		}
	}
}

// Not the standard library's, of which a child takes no goroutine.
type watchContext struct{ context.Context }

func (watchContext) Done() <-chan struct{} { return make(chan struct{}) }

// The bubble fails if a goroutine is left.
func TestWatchRefusedLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, "memory", zestor.StoreOptions[int]{})
		rwIs(t, rwErr(s.Watch(watchContext{t.Context()}, "k", zestor.WithSince(9))), zestor.ErrCompacted)
	})
}

// Behind a consumer that is stuck, a watch that has overflowed holds nothing more.
func TestWatchOverflowedTakesNoMore(t *testing.T) {
	s := open(t, "memory", zestor.StoreOptions[int]{})
	events := watchOn(t, s, "k", zestor.WithBufferSize(1))
	n := 0
	sets := func(until int) {
		for ; n < until; n++ {
			fileOK(t)(s.Set("k", "a", n))
		}
	}
	sets(1000)
	before := benchHeap()
	sets(200_000)
	if grown := benchHeap() - before; grown > 8<<20 {
		t.Errorf("%d bytes more after 199,000 changes that the watch does not take", grown)
	}
	if first, last := <-events, <-events; first.Revision != 1 || last.Revision != 1 || !errors.Is(last.Err, zestor.ErrWatchOverflow) {
		t.Errorf("got %+v and %+v", first, last)
	}
}

// Writers do not wait for a consumer that is stuck in its replay either when
// SQLite would like to start its write-ahead log anew.
func TestWatchStuckReplayHoldsNobodyUp(t *testing.T) {
	each(t, func(t *testing.T, s watchStore) {
		watchFill(t, s, "k", 200)
		watchOn(t, s, "k", zestor.WithInitialReplay())
		for i := range 14 {
			start := time.Now()
			watchSet(t, s, "j", "a", strconv.Itoa(i)+strings.Repeat("x", 500<<10))
			if d := time.Since(start); d > 2*time.Second {
				t.Fatalf("Set %d of 500 KiB took %v", i, d)
			}
		}
	})
}

// watchRaw stores a string as it is, and decodes it as it says.
var watchRaw = zestor.NewCodec(
	func(v any) ([]byte, error) { return []byte(v.(string)), nil },
	func(data []byte, v any) error {
		switch *v.(*string) = string(data); string(data) {
		case "fail":
			return os.ErrInvalid
		case "panic":
			panic("codec")
		case "goexit":
			runtime.Goexit()
		}
		return nil
	})

func TestWatchUndecodable(t *testing.T) {
	for _, kind := range kinds[1:] {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := zestor.SQLiteOptions[string]{DSN: ":memory:", Codec: watchRaw, DisableWAL: kind == "sqlite-rollback"}
				if kind != "sqlite-private" {
					o.DSN = filepath.Join(t.TempDir(), "test.db")
				}
				s := openSQLite(t, o)
				live, other := watchOn(t, s, "k"), watchOn(t, s, "k")
				want := []string{}
				for i, value := range []string{"fail", "1", "panic", "goexit", "goexit", "2"} {
					watchSet(t, s, "k", fmt.Sprint("a", i), value)
					if len(value) > 1 {
						value = ""
					}
					want = append(want, fmt.Sprintf("create a%d=%s v1 r%d", i, value, i+1)+strings.Repeat(" failed", max(0, 1-len(value))))
				}
				s.Delete("k", "a0")
				deleted := "delete a0= v1 r7 failed"
				watchWant(t, live, append(slices.Clone(want), deleted)...)
				watchWant(t, other, append(slices.Clone(want), deleted)...)
				watchWant(t, watchOn(t, s, "k", zestor.WithInitialReplay()), append(slices.Clone(want[1:]), "synced r7")...)
				since := watchOn(t, s, "k", zestor.WithSince(2))
				watchWant(t, since, append(slices.Clone(want[2:]), deleted, "synced r7")...)
				watchSet(t, s, "k", "a0", "3") // they all go on
				for _, ch := range []<-chan watchEvent{live, other, since} {
					watchWant(t, ch, "create a0=3 v1 r8")
				}
			})
		})
	}
	t.Run("half decoded is zero", func(t *testing.T) {
		s, path := watchFile(t, zestor.SQLiteOptions[user]{})
		raw := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path, Codec: watchRaw})
		ch := watchOn(t, s, "k")
		watchSet(t, raw, "k", "a", `{"Name":"half","Age":"x"}`)
		select {
		case ev := <-ch:
			var wrong *json.UnmarshalTypeError
			if ev.Value != (user{}) || !errors.As(ev.Err, &wrong) || !strings.HasPrefix(ev.Err.Error(), "zestor: watch k/a: ") {
				t.Fatalf("%+v", ev)
			}
		case <-time.After(fileDeadline):
			t.Fatal("no event")
		}
	})
	t.Run("nothing is decoded that nobody watches", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var decoded atomic.Int64
			codec := zestor.NewCodec(json.Marshal, func(data []byte, v any) error { decoded.Add(1); return json.Unmarshal(data, v) })
			s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: filepath.Join(t.TempDir(), "test.db"), Codec: codec})
			watchFill(t, s, "k", 10)
			watchOn(t, s, "j", zestor.WithSince(0))
			watchOn(t, s, "k", zestor.WithPrefix("none"), zestor.WithInitialReplay())
			watchFill(t, s, "k", 10)
			synctest.Wait()
			if n := decoded.Load(); n != 0 {
				t.Fatalf("%d values were decoded", n)
			}
		})
	})
}

// A store belongs to no bubble that watches it.
func TestWatchFromBubbles(t *testing.T) {
	each(t, func(t *testing.T, s zestor.Store[string]) {
		for i := range 3 {
			synctest.Test(t, func(t *testing.T) {
				events := watchOn(t, s, "k")
				watchSet(t, s, "k", "a", fmt.Sprint(i))
				rwEq(t, rwT((<-events).Revision), int64(i+1))
			})
		}
		check(t, s.Close())
	})
}

// Close waits as everything in a bubble does, so that a codec's clock goes on.
func TestCloseInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: ":memory:", Codec: zestor.NewCodec(json.Marshal, func(data []byte, v any) error {
			time.Sleep(time.Second)
			return json.Unmarshal(data, v)
		})})
		watchOn(t, s, "k")
		watchSet(t, s, "k", "a", "1")
		synctest.Wait()
		check(t, s.Close())
	})
}

// What was delivered is the consumer's alone.
func TestWatchKeepsNothing(t *testing.T) {
	eachBubble(t, func(t *testing.T, s zestor.Store[*user]) {
		events := watchOn(t, s, "k")
		fileOK(t)(s.Set("k", "a", &user{Age: 1}))
		value := weak.Make((<-events).Value)
		check(t, rwErr(s.Delete("k", "a")))
		<-events
		synctest.Wait()
		runtime.GC()
		if value.Value() != nil {
			t.Error("a value that was delivered is kept")
		}
	})
}

// Watching a file that others write.

var _ = child("watchWriter", func(args []string) {
	s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[string]{DSN: args[0]})
	must(err)
	goroutines, _ := strconv.Atoi(args[2])
	rounds, _ := strconv.Atoi(args[3])
	var all sync.WaitGroup
	for g := range goroutines {
		all.Go(func() { must(watchWrite(s, fmt.Sprintf("p%sg%d", args[1], g), rounds)) })
	}
	all.Wait()
	must(s.Close())
	fmt.Println("done")
})

// watchFollower prints each event after a revision until it is killed.
var _ = child("watchFollower", func(args []string) {
	s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[string]{DSN: args[0]})
	must(err)
	since, err := strconv.ParseInt(args[1], 10, 64)
	must(err)
	ch, err := s.Watch(context.Background(), "k", zestor.WithSince(since))
	must(err)
	for ev := range ch {
		fmt.Println(ev.Revision, watchText(ev))
	}
})

// watchPing sets the key that each line names, some time later, and prints
// when Set returned.
var _ = child("watchPing", func(args []string) {
	s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[string]{DSN: args[0]})
	must(err)
	var key string
	for n, _ := fmt.Scanln(&key); n == 1; n, _ = fmt.Scanln(&key) {
		time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond) // in no step with the polls
		must(rwErr(s.Set("k", key, "")))
		fmt.Println(time.Now().UnixNano())
	}
})

// watchFile makes a store in a file, and says where.
func watchFile[T any](t testing.TB, o zestor.SQLiteOptions[T]) (s zestor.Store[T], path string) {
	t.Helper()
	o.DSN = filepath.Join(t.TempDir(), "a.db")
	return openSQLite(t, o), o.DSN
}

// watchProcess has another process write.
func watchProcess(t testing.TB, path string, rounds int) func(i int) error {
	if long {
		rounds *= 20
	}
	return func(i int) error {
		p := start(t, "watchWriter", path, strconv.Itoa(i), "3", strconv.Itoa(rounds))
		if p.out.Scan(); p.out.Text() != "done" {
			return fmt.Errorf("writer %d failed", i)
		}
		return nil
	}
}

func TestWatchOtherProcesses(t *testing.T) {
	for _, rollback := range []bool{false, true} {
		t.Run(fmt.Sprintf("rollback journal %v", rollback), func(t *testing.T) {
			s, path := watchFile(t, zestor.SQLiteOptions[string]{DisableWAL: rollback, BusyTimeout: time.Minute})
			watchStorm(t, s, 4, watchProcess(t, path, map[bool]int{false: 25, true: 8}[rollback]), nil)
		})
	}
}

func TestWatchKilledAndResumed(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{})
	k, j := watchOn(t, s, "k"), watchOn(t, s, "j")
	stop, written := make(chan bool), make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				written <- nil
				return
			default:
			}
			if err := watchWrite(s, fmt.Sprint("w", i), 5); err != nil {
				written <- err
				return
			}
		}
	}()
	last, lines := "0", []string{}
	for range 5 {
		p := start(t, "watchFollower", path, last)
		for n := 5 + rand.IntN(20); p.out.Scan(); n-- { // also what it printed before it died
			revision, text, _ := strings.Cut(p.out.Text(), " ")
			if last = revision; !strings.HasPrefix(text, "synced ") {
				lines = append(lines, text)
			}
			if n == 0 {
				check(t, p.Process.Signal(syscall.SIGKILL))
			}
		}
	}
	close(stop)
	check(t, <-written)
	all := slices.DeleteFunc(watchVerify(t, s, k, j), func(ev watchEvent) bool { return ev.Kind != "k" })
	if len(lines) < 5*5 {
		t.Fatalf("the followers saw %d events", len(lines))
	}
	for i, line := range lines {
		if line != watchText(all[i]) {
			t.Fatalf("event %d is %q, want %q", i, line, watchText(all[i]))
		}
	}
}

func watchHasShell(t testing.TB) {
	if _, err := exec.LookPath("sqlite3"); err != nil {
		missing(t, "sqlite3")
	}
}

// watchShell runs the sqlite3 shell.
func watchShell(t testing.TB, path, sql string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), fileDeadline)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sqlite3", "-batch", "-bail", "-cmd", ".timeout 20000", path, sql).CombinedOutput()
	return string(out), err
}

func TestWatchOtherHands(t *testing.T) {
	watchHasShell(t)
	for _, rollback := range []bool{false, true} {
		t.Run(fmt.Sprintf("rollback journal %v", rollback), func(t *testing.T) {
			s, path := watchFile(t, zestor.SQLiteOptions[string]{DisableWAL: rollback})
			live, filtered := watchOn(t, s, "k"), watchOn(t, s, "k", zestor.WithPrefix("a"), zestor.WithInitialReplay())
			watchWant(t, filtered, "synced r0")
			readOnly := watchOn(t, openSQLite(t, zestor.SQLiteOptions[string]{DSN: "file:" + path + "?mode=ro"}), "k")
			const multi = ` ON CONFLICT (kind, key) DO UPDATE SET value = excluded.value, version = zestor_kv.version + 1,
				updated_at = strftime('%Y-%m-%dT%H:%M:%fZ','now')`
			all := []string{}
			for _, c := range []struct{ sql, want string }{ // want: events, or "refused"
				{`INSERT INTO zestor_kv (kind, key, value) VALUES ('k', 'a', '"1"')`, "create a=1 v1 r1"},
				{`INSERT INTO zestor_kv VALUES ('k', 'b', CAST('"1"' AS BLOB), 7, '2001-01-01T00:00:00.000Z', 2)`, "create b=1 v1 r2"}, // as copied from another store
				{`INSERT INTO zestor_kv (kind, key, value) VALUES ('k', 'c', '"1"'), ('j', 'c', '"1"'), ('k', 'd', '"1"')`, "create c=1 v1 r3,create d=1 v1 r5"},
				{`INSERT INTO zestor_kv (kind, key, value) VALUES ('k', 'a', '"2"')`, "refused"},
				{`INSERT OR IGNORE INTO zestor_kv (kind, key, value) VALUES ('k', 'a', '"2"')`, ""},
				{`INSERT INTO zestor_kv (kind, key, value) VALUES ('k', 'a', '"2"') ON CONFLICT DO UPDATE SET value = excluded.value`, "update a=2 v2 r6"},
				{`INSERT INTO zestor_kv (kind, key, value) VALUES ('k', 'e', '"2"') ON CONFLICT DO UPDATE SET value = excluded.value`, "create e=2 v1 r7"},
				{`INSERT INTO zestor_kv (kind, key, value) VALUES ('k', '', '"1"')`, "refused"}, // names that the store could neither give back nor delete
				{`INSERT INTO zestor_kv (kind, key, value) VALUES ('', 'k', '"1"')`, "refused"},
				{`INSERT INTO zestor_kv (kind, key, value) VALUES ('k', x'6162', '"1"')`, "refused"},
				{`INSERT INTO zestor_kv (kind, key, value) VALUES (x'6162', 'k', '"1"')`, "refused"},
				{`INSERT INTO zestor_kv (kind, key, value) VALUES ('k', 'a', '"3"')` + multi, "update a=3 v3 r8"},
				{`INSERT INTO zestor_kv (kind, key, value) VALUES ('k', 'a', '"3"')` + multi, ""},
				{`UPDATE zestor_kv SET value = '"3"' WHERE kind = 'k' AND key = 'a'`, ""},
				{`UPDATE zestor_kv SET value = CAST('"3"' AS BLOB) WHERE kind = 'k' AND key = 'a'`, ""},
				{`UPDATE zestor_kv SET value = value`, ""},
				{`UPDATE zestor_kv SET value = '"4"' WHERE kind = 'k' AND key IN ('a', 'b')`, "update a=4 v4 r9,update b=4 v2 r10"},
				{`UPDATE zestor_kv SET value = '"5"', kind = 'k', key = 'b' WHERE kind = 'k' AND key = 'b'`, "update b=5 v3 r11"},
				{`UPDATE zestor_kv SET value = 'not json' WHERE kind = 'k' AND key = 'c'`, "update c= v2 r12 failed"},
				{`DELETE FROM zestor_kv WHERE kind = 'k' AND key = 'c'`, "delete c= v2 r13 failed"},
				{`DELETE FROM zestor_kv WHERE kind = 'k' AND key = 'none'`, ""},
				{`INSERT OR REPLACE INTO zestor_kv (kind, key, value) VALUES ('k', 'a', '"6"')`, "create a=6 v1 r14"},
				{`REPLACE INTO zestor_kv (kind, key, value) VALUES ('k', 'c', '"6"')`, "create c=6 v1 r15"},
				{`UPDATE zestor_kv SET key = 'z' WHERE kind = 'k' AND key = 'a'`, "refused"},
				{`UPDATE OR REPLACE zestor_kv SET key = 'b', value = '"7"' WHERE kind = 'k' AND key = 'a'`, "refused"},
				{`UPDATE zestor_kv SET kind = 'z'`, "refused"},
				{`BEGIN; UPDATE zestor_kv SET value = '"8"'; DELETE FROM zestor_kv; ROLLBACK`, ""},
				{`BEGIN; DELETE FROM zestor_kv WHERE key = 'a'; INSERT INTO zestor_kv (kind, key, value) VALUES ('k', 'a', '"9"');
					UPDATE zestor_kv SET value = '"10"' WHERE key = 'a'; COMMIT`, "delete a=6 v1 r16,create a=9 v1 r17,update a=10 v2 r18"},
				{`DELETE FROM zestor_kv WHERE key IN ('a', 'd')`, "delete a=10 v2 r19,delete d=1 v1 r20"},
				{`VACUUM`, ""},
			} {
				before := fmt.Sprint(rwT(s.Values("k")))
				out, err := watchShell(t, path, c.sql)
				if (err != nil) != (c.want == "refused") {
					t.Fatalf("%s: %v %s", c.sql, err, out)
				}
				if c.want == "refused" || c.want == "" {
					fileEqual(t, c.sql, fmt.Sprint(rwT(s.Values("k"))), before)
					continue // an event that should not be is found before the next
				}
				for want := range strings.SplitSeq(c.want, ",") {
					watchWant(t, live, want)
					if all = append(all, want); strings.Contains(want, " a=") {
						watchWant(t, filtered, want)
					}
					what, rest, _ := strings.Cut(want, " ")
					key, rest, _ := strings.Cut(rest, "=")
					e, ok, err := s.GetEntry("k", key)
					got := fmt.Sprintf("%s v%d r%d%s", e.Value, e.Version, e.Revision, map[bool]string{true: " failed"}[err != nil])
					age := time.Since(e.UpdatedAt)
					last := strings.LastIndex(c.want, " "+key+"=") == strings.LastIndex(c.want, want)+len(what)
					if last && (ok == (what == "delete") || ok && (got != rest || age < -time.Minute || age > time.Minute)) {
						t.Fatalf("%s: the entry is %q of %v, want %q", c.sql, got, e.UpdatedAt, rest)
					}
				}
			}
			watchWant(t, watchOn(t, s, "k", zestor.WithSince(0)), append(slices.Clone(all), "synced r20")...)
			watchWant(t, readOnly, all...)
			// The store's own writes go on from there.
			watchSet(t, s, "k", "b", "11")
			watchWant(t, live, "update b=11 v4 r21")
			if r, err := s.SetIf("k", "e", "11", 7); err != nil || r != 22 {
				t.Fatalf("SetIf gives %d, %v", r, err)
			}
			watchWant(t, live, "update e=11 v2 r22")

			if _, err := watchShell(t, path, `DELETE FROM zestor_log`); err != nil {
				t.Fatal(err)
			}
			watchSet(t, s, "k", "b", "12")
			ev, _ := watchNext(t, live)
			if text := watchText(ev); text != "update b=12 v5 r23" && text != "error r22 compacted" {
				t.Fatalf("after the log was emptied came %q", text)
			}
			if _, err := s.Watch(t.Context(), "k", zestor.WithSince(20)); !errors.Is(err, zestor.ErrCompacted) {
				t.Fatalf("WithSince of a deleted revision: %v", err)
			}
			s2 := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
			check(t, rwErr(watchShell(t, path, `DELETE FROM zestor_kv; DELETE FROM zestor_log`)))
			if r := watchRevision(t, s2); r != 27 {
				t.Fatalf("revision %d after all was deleted, want 27", r)
			}
			watchSet(t, s2, "k", "b", "1")
			watchWant(t, watchOn(t, s, "k", zestor.WithInitialReplay()), "create b=1 v1 r28", "synced r28")

			// What a watch has yet to read, and is not there any more.
			live = watchOn(t, s, "k")
			check(t, rwErr(watchShell(t, path, `BEGIN; UPDATE zestor_kv SET value = '"2"'; UPDATE zestor_kv SET value = '"3"'; DELETE FROM zestor_log; COMMIT`)))
			watchWant(t, live, "error r28 compacted", "closed")
		})
	}
}

func TestWatchCheckpointAndVacuum(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{BusyTimeout: time.Minute})
	done := map[string]int{}
	watchHasShell(t)
	watchStorm(t, s, 2, watchProcess(t, path, 60), func() error {
		for _, sql := range []string{"PRAGMA wal_checkpoint(TRUNCATE)", "VACUUM"} {
			if out, err := watchShell(t, path, sql); err == nil && !strings.HasPrefix(out, "1") {
				done[sql]++
			}
		}
		return nil
	})
	if t.Log(done); done["VACUUM"] == 0 || done["PRAGMA wal_checkpoint(TRUNCATE)"] == 0 {
		t.Fatal("the file was too busy")
	}
}

// The poll sees another store of this process like another
// process, and the clock of a bubble shows when it runs.
func TestWatchPolls(t *testing.T) {
	for _, rollback := range []bool{false, true} {
		t.Run(fmt.Sprintf("rollback journal %v", rollback), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, path := watchFile(t, zestor.SQLiteOptions[string]{DisableWAL: rollback})
				other := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
				for range 3 { // polling ends with the last watch and starts with the next
					watchFill(t, other, "k", 3)
					ctx, cancel := context.WithCancel(t.Context())
					ch, err := s.Watch(ctx, "k")
					check(t, err)
					start := time.Now()
					watchWant(t, ch, watchFill(t, other, "k", 3)...)
					if d := time.Since(start); d > 22*time.Millisecond {
						t.Fatalf("it came after %v", d)
					}
					second := watchOn(t, s, "k")
					cancel()
					synctest.Wait()
					watchWant(t, second, watchFill(t, other, "k", 1)...)
					check(t, s.Close())
					watchWant(t, second, "closed")
					watchIdle(t)
					s = openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
				}
			})
		})
	}
}

// Whatever the pause after which a writer goes on who waits for the watch, or
// writes at a steady pace. By the bubble's clock, so that no machine is too slow.
func TestWatchPollsOfAnswers(t *testing.T) {
	for pause := time.Duration(0); pause < 100*time.Millisecond; pause = pause*5/4 + time.Millisecond {
		synctest.Test(t, func(t *testing.T) {
			s, path := watchFile(t, zestor.SQLiteOptions[string]{})
			other := openSQLite(t, zestor.SQLiteOptions[string]{DSN: fileURI(path, "_sync=OFF")})
			ch := watchOn(t, s, "k")
			var answers, steady []time.Duration
			for i := range 200 {
				time.Sleep(pause)
				watchSet(t, other, "k", "a", fmt.Sprint(i))
				start := time.Now()
				watchNext(t, ch)
				answers = append(answers, time.Since(start))
			}
			sent := make(chan time.Time, 200)
			go func() {
				for i := range cap(sent) {
					time.Sleep(pause + time.Millisecond)
					watchSet(t, other, "k", "b", fmt.Sprint(i))
					sent <- time.Now()
				}
			}()
			for range cap(sent) {
				watchNext(t, ch)
				now := time.Now()
				steady = append(steady, now.Sub(<-sent))
			}
			for name, latencies := range map[string][]time.Duration{"answers": answers, "steady": steady} {
				if slices.Sort(latencies); latencies[len(latencies)/2] >= 10*time.Millisecond {
					t.Errorf("%s after %v: the median is %v", name, pause, latencies[len(latencies)/2])
				}
			}
		})
	}
}

// watchBackup has the shell back a file up, and returns what restores it while it is open.
func watchBackup(t testing.TB, path string) (restore func()) {
	watchHasShell(t)
	shell := func(command string) {
		t.Helper()
		check(t, rwErr(watchShell(t, path, command)))
	}
	backup := filepath.Join(t.TempDir(), "backup.db")
	shell(".backup " + backup)
	return func() { shell(".restore " + backup) }
}

// What the shell's .restore puts in place of a watched file's data is another history.
func TestWatchRestored(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{})
	watchFill(t, s, "k", 3)
	restore := watchBackup(t, path)
	watchFill(t, s, "k", 3)
	ch := watchOn(t, s, "k")
	restore()
	watchWant(t, ch, "error r6 compacted", "closed")
	ch = watchOn(t, s, "k", zestor.WithSince(3))
	watchNext(t, ch) // EventSynced
	watchWant(t, ch, watchFill(t, s, "k", 3)...)
}

// A watch that begins between a restore and the tail's next look, which is still beyond the file's
// newest revision, is refused, or it would miss what comes until there.
func TestWatchRestoredJustNow(t *testing.T) {
	watchHasShell(t)
	for _, opts := range [][]zestor.WatchOption{nil, {zestor.WithInitialReplay()}, {zestor.WithSince(3)}} {
		synctest.Test(t, func(t *testing.T) { // whose clock stands still while this runs
			s, path := watchFile(t, zestor.SQLiteOptions[string]{})
			other := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
			watchFill(t, other, "k", 3)
			restore := watchBackup(t, path)
			watchFill(t, other, "k", 10)
			older := watchOn(t, s, "k")
			events := watchFill(t, other, "k", 100)
			time.Sleep(25_300 * time.Microsecond) // of the bubble: the tail looks, but at no time that main wakes at
			restore()
			ch, err := s.Watch(t.Context(), "k", opts...)
			if !errors.Is(err, zestor.ErrCompacted) || ch != nil {
				t.Fatalf("Watch: %v", err)
			}
			time.Sleep(25_300 * time.Microsecond)
			ctx, cancel := context.WithCancel(t.Context())
			check(t, rwErr(s.Watch(ctx, "k")))
			synctest.Wait()
			cancel()
			watchNoGoroutine(t, ").tail(") // older waits only for its consumer
			ch = watchOn(t, s, "k", zestor.WithSince(3))
			watchWant(t, older, append(events, "error r113 compacted", "closed")...)
			watchNext(t, ch) // EventSynced
			watchWant(t, ch, watchFill(t, other, "k", 15)...)
			check(t, s.Close()) // within the bubble
			check(t, other.Close())
		})
	}
}

// A restore ends all watches at once, also one that began beyond what the tail has
// come to, even if the file then grows past where they began.
func TestWatchRestoredBelowItsBeginning(t *testing.T) {
	for _, between := range []int{0, 100} { // changes that the tail has not seen and the restore leaves
		for _, again := range []bool{false, true} { // whether somebody tries to watch, which makes the tail look
			synctest.Test(t, func(t *testing.T) { // whose clock stands still while this runs
				s, path := watchFile(t, zestor.SQLiteOptions[string]{})
				other := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
				older := watchOn(t, s, "k")
				events := watchFill(t, other, "k", 100) // more than fit the channel
				time.Sleep(25_300 * time.Microsecond)   // of the bubble: the tail looks, and is at 100
				watchFill(t, other, "k", between)
				restore := watchBackup(t, path)
				watchFill(t, other, "k", 100)
				ch := watchOn(t, s, "k")
				restore()
				if again {
					if _, err := s.Watch(t.Context(), "k"); !errors.Is(err, zestor.ErrCompacted) {
						t.Fatalf("Watch: %v", err)
					}
				}
				time.Sleep(25_300 * time.Microsecond)
				watchFill(t, other, "k", 200)
				watchWant(t, ch, fmt.Sprintf("error r%d compacted", 200+between), "closed")
				watchWant(t, older, append(events, "error r100 compacted", "closed")...)
				watchWant(t, watchOn(t, s, "k"), watchFill(t, other, "k", 10)...)
				check(t, s.Close()) // within the bubble
				check(t, other.Close())
			})
		}
	}
}

// SQLite returns a row as it is before its triggers have put it right.
func TestFileReturning(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	fileMake(t, path, 1)
	fileEqual(t, "returned", fileQuery(t, path, `UPDATE zestor_kv SET value = '{}' RETURNING version`), "1")
	fileEqual(t, "stored", fileQuery(t, path, `SELECT version FROM zestor_kv`), "2")
}

// A copy made with .dump goes on where the file was.
func TestFileDumped(t *testing.T) {
	watchHasShell(t)
	s, path := watchFile(t, zestor.SQLiteOptions[string]{})
	watchFill(t, s, "k", 10)
	dump, err := watchShell(t, path, ".dump")
	check(t, err)
	copied := filepath.Join(t.TempDir(), "b.db")
	fileSQL(t, copied, dump)
	b := openSQLite(t, zestor.SQLiteOptions[string]{DSN: copied})
	fileEqual(t, "state", fmt.Sprint(rwState[string](b)...), fmt.Sprint(rwState[string](s)...))
	fileEqual(t, "version", fileQuery(t, copied, `PRAGMA user_version`), "1")
	ch := watchOn(t, b, "k", zestor.WithSince(0))
	for range 10 {
		watchNext(t, ch)
	}
	watchNext(t, ch) // EventSynced
	watchWant(t, ch, watchFill(t, b, "k", 1)...)
}

// The README's way to back up, while somebody writes.
func TestFileBackup(t *testing.T) {
	watchHasShell(t)
	s, path := watchFile(t, zestor.SQLiteOptions[int]{})
	set := func(i int) error {
		return s.Update(func(tx zestor.ReadWriter[int]) error {
			return errors.Join(rwErr(tx.Set("k", "a", i)), rwErr(tx.Set("k", "b", i)))
		})
	}
	check(t, set(1))
	ctx, stop := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		for i := 2; ctx.Err() == nil; i++ {
			check(t, set(i))
		}
	})
	for range 5 {
		backup := filepath.Join(t.TempDir(), "backup.db")
		out, err := watchShell(t, path, fileReadme(t, "VACUUM INTO 'backup.db'", "backup.db", backup))
		if err != nil {
			t.Fatal(err, out)
		}
		b := openSQLite(t, zestor.SQLiteOptions[int]{DSN: backup})
		e := rwEntry(t, b, "k", "b")
		rwEq(t, rwT(b.Get("k", "a")), e.Value, true, nil)
		rwEq(t, rwT(e.Version, e.Revision, watchRevision(t, b)), int64(e.Value), int64(2*e.Value), int64(2*e.Value))
		rwEq(t, rwT(b.SetIf("k", "b", 0, e.Revision)), e.Revision+1, nil) // goes on
	}
	stop()
	group.Wait()
}

// The README's way to wipe a deleted secret leaves nothing of it.
func TestFileWiped(t *testing.T) {
	watchHasShell(t)
	s, path := watchFile(t, zestor.SQLiteOptions[string]{})
	watchSet(t, s, "k", "secret", "swordfish")
	rwEq(t, rwT(s.Delete("k", "secret")), true, "swordfish", nil)
	watchSet(t, s, "k", "a", "1")
	check(t, s.Close())
	found := func() (n int) {
		for _, text := range fileTree(t, filepath.Dir(path)) {
			n += strings.Count(text, "swordfish") + strings.Count(text, "secret")
		}
		return n
	}
	fileEqual(t, "it was there", found() > 0, true)
	check(t, rwErr(watchShell(t, path, fileReadme(t, "DELETE FROM zestor_log; VACUUM; PRAGMA wal_checkpoint(TRUNCATE)"))))
	fileEqual(t, "secrets left", found(), 0)
	fileEqual(t, "revision", watchRevision(t, openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})), 3)
}

// fileReadme is SQL that README.md tells to type, with the old words replaced by the new.
func fileReadme(t testing.TB, sql string, oldnew ...string) string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	check(t, err)
	if !strings.Contains(string(text), `"`+sql+`"`) {
		t.Errorf("README.md does not say %q", sql)
	}
	return strings.NewReplacer(oldnew...).Replace(sql)
}

// watchLog looks into the log by other means.
func watchLog(t testing.TB, path string) (rows, size, oldest, newest int64) {
	t.Helper()
	db := fileDB(t, path)
	defer db.Close()
	check(t, db.QueryRow(`SELECT count(*), ifnull(sum(length(CAST(kind AS BLOB)) + length(CAST(key AS BLOB)) + length(value)), 0),
		ifnull(min(revision), 0), ifnull(max(revision), 0) FROM zestor_log`).Scan(&rows, &size, &oldest, &newest))
	return rows, size, oldest, newest
}

// A full history is cut by a sixteenth, and by less than a change more.
func TestHistoryIsCutByASixteenth(t *testing.T) {
	const limit, change = 16 << 10, 64 + 1 + 1 + 100
	s, path := watchFile(t, zestor.SQLiteOptions[string]{HistoryBytes: limit})
	trimmed := false
	for i := range 300 {
		watchSet(t, s, "k", "a", fmt.Sprintf("%098d", i)) // 100 bytes of JSON
		rows, size, oldest, _ := watchLog(t, path)
		size += 64 * rows
		trimmed = trimmed || oldest > 1
		if size > limit || trimmed && size <= limit-limit/16-change {
			t.Fatalf("after %d changes the log has %d bytes of %d", i+1, size, limit)
		}
	}
	fileEqual(t, "trimmed", trimmed, true)
}

func TestWatchHistoryBytes(t *testing.T) {
	const limit = 16 << 10
	small := zestor.SQLiteOptions[string]{HistoryBytes: limit}
	fits := func(t *testing.T, s watchStore, path string, limit int64) {
		t.Helper()
		rows, size, oldest, newest := watchLog(t, path)
		if size > limit && rows > 1 || newest != watchRevision(t, s) || newest-oldest+1 != rows {
			t.Fatalf("the log has %d rows, %d bytes of %d, from %d to %d of %d", rows, size, limit, oldest, newest, watchRevision(t, s))
		}
		if oldest > 1 && size+200*rows < limit/2 {
			t.Fatalf("the log keeps only %d rows with %d bytes of %d", rows, size, limit)
		}
	}
	// exact looks at WithSince at every revision.
	exact := func(t *testing.T, s watchStore, path string, all []watchEvent) {
		t.Helper()
		_, _, oldest, newest := watchLog(t, path)
		for r := range newest + 2 {
			ctx, cancel := context.WithCancel(t.Context())
			ch, err := s.Watch(ctx, "k", zestor.WithSince(r))
			if r < oldest-1 || r > newest {
				if !errors.Is(err, zestor.ErrCompacted) || ch != nil {
					t.Fatalf("WithSince(%d) of %d to %d: %v", r, oldest, newest, err)
				}
			} else {
				check(t, err)
				for _, ev := range all[r:] {
					watchWant(t, ch, watchText(ev))
				}
				watchWant(t, ch, fmt.Sprintf("synced r%d", newest))
			}
			cancel()
		}
	}
	s, path := watchFile(t, small)
	live := watchOn(t, s, "k")
	rnd := rand.New(rand.NewPCG(1, 2))
	watchSet(t, s, "k", "1", "")
	for i := range 120 {
		switch key := fmt.Sprint(rnd.IntN(9)); rnd.IntN(4) {
		case 0:
			s.Delete("k", key)
		case 1:
			check(t, s.SetMany("k", map[string]string{key: fmt.Sprint(i), "b": fmt.Sprint(i), "c": strings.Repeat("y", i)}))
		default:
			watchSet(t, s, "k", key, fmt.Sprint(i)+strings.Repeat("z", rnd.IntN(400)))
		}
		if i%4 == 0 {
			fits(t, s, path, limit)
		}
	}
	newest := watchRevision(t, s)
	all := watchUntil(t, live, func(ev watchEvent) bool { return ev.Revision == newest })
	if _, _, oldest, _ := watchLog(t, path); oldest < 2 {
		t.Fatal("nothing was trimmed")
	}
	exact(t, s, path, all)
	check(t, s.Close())
	watchWant(t, live, "closed")
	small.DSN = path
	s = openSQLite(t, small)
	exact(t, s, path, all)
	watchSet(t, s, "k", "1", "new")
	fits(t, s, path, limit)

	whole := t
	t.Run("the smallest limit wins", func(t *testing.T) {
		big := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
		for i := range 30 {
			watchSet(t, big, "k", "1", fmt.Sprint(i)+strings.Repeat("z", 1000))
			watchSet(t, s, "k", "2", fmt.Sprint(i))
			fits(t, s, path, limit)
		}
		check(t, s.Close())
		s = openSQLite(whole, zestor.SQLiteOptions[string]{DSN: path, HistoryBytes: limit / 4})
		watchSet(t, s, "k", "2", "new")
		fits(t, s, path, limit/4)
	})
	t.Run("the newest is always kept", func(t *testing.T) {
		r := watchRevision(t, s)
		watchSet(t, s, "k", "huge", strings.Repeat("z", 3*limit))
		watchWant(t, watchOn(t, s, "k", zestor.WithSince(r)), fmt.Sprintf("create huge=%s v1 r%d", strings.Repeat("z", 3*limit), r+1), fmt.Sprintf("synced r%d", r+1))
		fits(t, s, path, limit/4)
		watchSet(t, s, "k", "huge", "") // and forgotten in time
		if _, size, _, _ := watchLog(t, path); size > limit {
			t.Fatalf("the log has %d bytes", size)
		}
	})
	t.Run("a transaction larger than the history leaves no gap", func(t *testing.T) {
		other := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
		r := watchRevision(t, s)
		watches := []<-chan watchEvent{watchOn(t, s, "k"), watchOn(t, other, "k"), watchOn(t, other, "k", zestor.WithSince(r))}
		watchWant(t, watches[2], fmt.Sprintf("synced r%d", r))
		texts := watchFill(t, s, "k", 2000)
		fits(t, s, path, limit/4)
		for _, ch := range watches {
			ev, _ := watchNext(t, ch)
			if ev.Type != zestor.EventError { // one that was quick enough has it all
				if watchText(ev) != texts[0] {
					t.Fatalf("the first event is %q, want %q", watchText(ev), texts[0])
				}
				watchWant(t, ch, texts[1:]...)
			} else if ev.Err != zestor.ErrCompacted || ev.Revision != r {
				t.Fatalf("the end at %d is %q", r, watchText(ev))
			} else {
				watchWant(t, ch, "closed")
			}
		}
		if _, err := s.Watch(t.Context(), "k", zestor.WithSince(r)); !errors.Is(err, zestor.ErrCompacted) {
			t.Fatalf("WithSince(%d): %v", r, err)
		}
		watchWant(t, watchOn(t, other, "k", zestor.WithSince(r+2000)), fmt.Sprintf("synced r%d", r+2000))
	})
	t.Run("deletes alone are forgotten too", func(t *testing.T) {
		keys, err := s.Keys("k")
		check(t, err)
		for i, key := range keys[:500] {
			check(t, rwErr(s.Delete("k", key)))
			if i%50 == 0 {
				fits(t, s, path, limit/4)
			}
		}
	})
}

// However much a transaction reads, it trims about as much as it writes.
func TestWatchHistoryIsCutInSteps(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{})
	watchFill(t, s, "k", 20_000)
	check(t, s.Close())
	s = openSQLite(t, zestor.SQLiteOptions[string]{DSN: path, HistoryBytes: 1000})
	check(t, s.Update(func(tx zestor.ReadWriter[string]) error {
		for i := range 20_000 {
			if _, _, err := tx.Get("k", fmt.Sprintf("%06d.%d", i+1, i)); err != nil {
				return err
			}
		}
		all, err := tx.List("k")
		check(t, err)
		check(t, tx.SetMany("k", all)) // equal values are no changes
		return rwErr(tx.Set("k", "a", "x"))
	}))
	if rows, _, _, _ := watchLog(t, path); rows < 19_000 || rows > 20_000 {
		t.Fatalf("one change of 20000 rows left %d", rows)
	}
}

// Nor does a small change trim many large ones. What has written more trims more.
func TestWatchHistoryOfLargeValuesIsCutInSteps(t *testing.T) {
	const size, limit = 4 << 20, 100_000
	s, path := watchFile(t, zestor.SQLiteOptions[string]{HistoryBytes: limit})
	watchSet(t, s, "k", "a", "")
	large := fmt.Sprintf("UPDATE zestor_kv SET value = randomblob(%d);", size)
	fileSQL(t, path, strings.Repeat(large, 8))
	_, before, _, _ := watchLog(t, path)
	for i := 0; before > limit; i++ {
		watchSet(t, s, "k", "b", fmt.Sprint(i))
		_, now, _, _ := watchLog(t, path)
		if now >= before || now < before-6*size {
			t.Fatalf("one small change took the log from %d to %d bytes", before, now)
		}
		before = now
	}
	watchSet(t, s, "k", "a", strings.Repeat("x", 18<<20)) // the newest, which stays
	half := strings.Repeat("x", limit*2/3)
	check(t, s.SetMany("k", map[string]string{"b": half, "c": half}))
	if rows, now, _, _ := watchLog(t, path); rows != 1 || now > limit {
		t.Fatalf("the log has %d rows, %d bytes", rows, now)
	}
}

// Nor does the log grow by what others write, as long as the store writes too.
func TestWatchHistoryKeepsPaceWithOthers(t *testing.T) {
	const limit = 1 << 20
	s, path := watchFile(t, zestor.SQLiteOptions[string]{HistoryBytes: limit})
	watchSet(t, s, "k", "a", "")
	for i := range 50 {
		fileSQL(t, path, `UPDATE zestor_kv SET value = randomblob(400000); UPDATE zestor_kv SET value = randomblob(400000)`)
		watchSet(t, s, "k", "a", fmt.Sprint(i))
		if _, size, _, _ := watchLog(t, path); size > limit {
			t.Fatalf("the log has %d bytes", size)
		}
	}
}

// watchLatency is the median time from another process's return of Set to its
// event, over n changes.
func watchLatency(t testing.TB, n int) time.Duration {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{})
	ch := watchOn(t, s, "k")
	p := start(t, "watchPing", path)
	var all []time.Duration
	for i := range n {
		fmt.Fprintf(p.in, "%d\n", i)
		ev, ok := watchNext(t, ch)
		now := time.Now()
		if !ok || ev.Key != strconv.Itoa(i) {
			t.Fatalf("event %d is %q", i, watchText(ev))
		}
		returned, err := strconv.ParseInt(p.line(t), 10, 64)
		check(t, err)
		all = append(all, now.Sub(time.Unix(0, returned)))
	}
	slices.Sort(all)
	return all[n/2]
}

func TestWatchLatency(t *testing.T) {
	if median := watchLatency(t, 20); median > 500*time.Millisecond {
		t.Fatalf("the median is %v", median)
	}
}

// SQLite can be led to believe that the log is short. To deliver a transaction
// of one change or of a few must take less than a quarter of what it takes to
// read it all.
func TestWatchAfterAnalyze(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{})
	watchFill(t, s, "k", 1)
	fileSQL(t, path, "ANALYZE")
	check(t, s.Close())
	s = openSQLite(t, zestor.SQLiteOptions[string]{DSN: "file:" + path + "?_synchronous=OFF"}) // time is measured
	watchFill(t, s, "k", 100_000)
	fileOK(t)(s.Set("k", "first", "")) // which first lets others write, after so long a transaction
	ch := watchOn(t, s, "k")
	db := fileDB(t, path)
	var delivering, reading time.Duration
	for i := range 20 {
		changes := map[string]string{}
		for j := range 1 + i%2*9 {
			changes[fmt.Sprint("key", j)] = fmt.Sprint(i)
		}
		start, n := time.Now(), 0
		check(t, s.SetMany("k", changes))
		for range changes {
			watchNext(t, ch)
		}
		delivering += time.Since(start)
		start = time.Now()
		check(t, db.QueryRow(`SELECT count(*) FROM zestor_log WHERE type > ''`).Scan(&n))
		reading += time.Since(start)
		if want := 100_003 + i + (i+1)/2*9; n != want {
			t.Fatalf("the log has %d rows, want %d", n, want)
		}
	}
	if 4*delivering > reading {
		t.Errorf("20 transactions took %v to deliver, reading the log %v", delivering, reading)
	}
}

func BenchmarkWatchLatency(b *testing.B) {
	var median time.Duration
	for b.Loop() {
		median = watchLatency(b, 200)
	}
	b.ReportMetric(float64(median.Microseconds())/1000, "ms/median")
}

func BenchmarkWatchIdle(b *testing.B) {
	s, path := watchFile(b, zestor.SQLiteOptions[string]{})
	watchFill(b, s, "k", 1)
	fileSQL(b, path, "ANALYZE") // SQLite goes on thinking that the log is this short
	values := make(map[string]string)
	for i := range 20_000 {
		values[fmt.Sprint(i)] = "v"
	}
	check(b, s.SetMany("k", values))
	watchOn(b, s, "k")
	cpu := func() time.Duration {
		var u syscall.Rusage
		check(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	runtime.GC()
	used, start := cpu(), time.Now()
	for b.Loop() {
		time.Sleep(2 * time.Second)
	}
	b.ReportMetric(100*float64(cpu()-used)/float64(time.Since(start)), "%cpu")
}

// The SQLite file: its schema, DSNs, files that are refused, and old ones.

// fileDeadline is when what should have happened has not. In a bubble it passes at once.
const fileDeadline = 60 * time.Second

// fileMore is a size of a test: short, or wanted when there is time.
func fileMore(short, full int) int {
	if long {
		return full
	}
	return short
}

// fileBad says what is wrong with an error that should hold all parts.
func fileBad(err error, parts ...string) error {
	for _, part := range append(parts, "zestor: ") {
		if err == nil || !strings.Contains(err.Error(), part) {
			return fmt.Errorf("error is %v, want one with %q", err, part)
		}
	}
	return nil
}

// fileSoon fails the test if fn fails, panics, or takes forever.
func fileSoon(t testing.TB, fn func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- fmt.Errorf("panic: %v\n%s", p, debug.Stack())
			}
		}()
		done <- fn()
	}()
	select {
	case err := <-done:
		check(t, err)
	case <-time.After(fileDeadline):
		stacks := make([]byte, 1<<20)
		t.Fatalf("hangs\n%s", stacks[:runtime.Stack(stacks, true)])
	}
}

// fileKill kills a child as a crash would.
func fileKill(p *process) {
	p.Process.Kill()
	p.Wait()
}

func fileOpen(dsn string) (zestor.Store[user], error) {
	return zestor.NewSQLiteStore(zestor.SQLiteOptions[user]{DSN: dsn})
}

// fileURI is the file: form of a path.
func fileURI(path, params string) string {
	return "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + params
}

// fileDB is one connection of other hands to a file, which ends with the test.
func fileDB(t testing.TB, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite3", fileURI(path, "_busy_timeout=20000"))
	check(t, err)
	t.Cleanup(func() { check(t, db.Close()) })
	db.SetMaxOpenConns(1)
	return db
}

// fileSQL runs statements on one connection of its own.
func fileSQL(t testing.TB, path string, statements ...string) {
	t.Helper()
	db := fileDB(t, path)
	defer db.Close()
	for _, s := range statements {
		if _, err := db.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

// fileQuery is the result of a query as text: a line for each row.
func fileQuery(t testing.TB, path, query string) string {
	t.Helper()
	db := fileDB(t, path)
	defer db.Close()
	rows, err := db.Query(query)
	check(t, err)
	defer rows.Close()
	columns, err := rows.Columns()
	check(t, err)
	var lines []string
	for rows.Next() {
		row, into := make([]sql.NullString, len(columns)), make([]any, len(columns))
		for i := range row {
			into[i] = &row[i]
		}
		check(t, rows.Scan(into...))
		var fields []string
		for _, f := range row {
			fields = append(fields, f.String)
		}
		lines = append(lines, strings.Join(fields, "|"))
	}
	check(t, rows.Err())
	return strings.Join(lines, "\n")
}

func fileEqual[V comparable](t testing.TB, what string, got, want V) {
	t.Helper()
	if got != want {
		t.Fatalf("%s: got %v, want %v", what, got, want)
	}
}

// fileOK and fileGet check the results of a call.
func fileOK(t testing.TB) func(got any, err error) {
	return func(_ any, err error) { t.Helper(); check(t, err) }
}

func fileGet(t testing.TB, want any) func(got any, err error) {
	return func(got any, err error) {
		t.Helper()
		if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("got %v and error %v, want %v", got, err, want)
		}
	}
}

// fileTree is every file in a directory. No store may have one open.
func fileTree(t testing.TB, dir string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	names, err := os.ReadDir(dir)
	check(t, err)
	for _, n := range names {
		data, err := os.ReadFile(filepath.Join(dir, n.Name()))
		if !n.IsDir() {
			check(t, err)
		}
		tree[n.Name()] = string(data)
	}
	return tree
}

// fileSame fails unless the files are as before, but for what SQLite needs to
// read a file in WAL mode.
func fileSame(t testing.TB, dir string, before map[string]string) {
	t.Helper()
	after := fileTree(t, dir)
	for _, tree := range []map[string]string{before, after} {
		maps.DeleteFunc(tree, func(name, data string) bool {
			return strings.HasSuffix(name, "-shm") || strings.HasSuffix(name, "-wal") && data == ""
		})
	}
	if !maps.Equal(before, after) {
		t.Fatalf("files were %v and are %v, or their bytes differ",
			slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
	}
}

// fileMake makes a store of n users k/0000 and on, closed.
func fileMake(t testing.TB, path string, n int) {
	t.Helper()
	s, err := fileOpen(fileURI(path, "_sync=OFF"))
	check(t, err)
	many := map[string]user{}
	for i := range n {
		many[fmt.Sprintf("%04d", i)] = user{Name: strings.Repeat("x", i*7%5000), Age: i}
	}
	check(t, s.SetMany("k", many))
	check(t, s.Close())
}

func TestFileSchema(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[user]{})
	s.Set("k", "a", user{Name: "Ann"})
	s.Set("k", "a", user{Name: "Bob"})
	fileEqual(t, "primary key", fileQuery(t, path, `SELECT group_concat(name || ' ' || type) FROM
		(SELECT * FROM pragma_table_info('zestor_kv') WHERE pk > 0 ORDER BY pk)`), "kind TEXT,key TEXT")
	fileEqual(t, "types", fileQuery(t, path, `SELECT name, type FROM pragma_table_info('zestor_kv')
		WHERE name IN ('value', 'version', 'updated_at') ORDER BY name`), "updated_at|TEXT\nvalue|BLOB\nversion|INTEGER")
	fileEqual(t, "row", fileQuery(t, path, `SELECT kind, key, CAST(value AS TEXT), version FROM zestor_kv`),
		`k|a|{"Name":"Bob","Email":"","City":"","Age":0}|2`)
	fileEqual(t, "log", fileQuery(t, path, `SELECT count(*) FROM zestor_log`), "2")
	if fileQuery(t, path, `PRAGMA user_version`) == "0" {
		t.Fatal("the schema has no version")
	}
	// Files that exist hold this very text, and no other is taken for it: whoever changes the
	// schema, if only a space of it, has to count its version up and to upgrade them.
	text := fileQuery(t, path, `SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name`)
	fileEqual(t, "hash of the schema", fmt.Sprintf("%x", sha256.Sum256([]byte(text)))[:16], "21ffed0340e75500")
	fileSQL(t, path, `INSERT INTO zestor_kv (kind, key, value) VALUES ('k', 'b', '{}')`)
	for _, key := range []string{"a", "b"} { // by the store and by other hands
		at := fileQuery(t, path, `SELECT updated_at || '' FROM zestor_kv WHERE key = '`+key+`'`)
		if !regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$`).MatchString(at) {
			t.Fatalf("updated_at is %q", at)
		}
		e, _, err := s.GetEntry("k", key)
		check(t, err)
		fileEqual(t, "UpdatedAt", e.UpdatedAt.Format("2006-01-02T15:04:05.000Z"), at)
		if age := time.Since(e.UpdatedAt); age < -time.Second || age > fileDeadline {
			t.Fatalf("updated %v ago", age)
		}
	}
}

func TestFileDSN(t *testing.T) {
	odd := "a b#c%20d+e&f;é日本'\"\\.db"
	for _, c := range []struct{ name, dsn, file string }{
		{"a path is literal", "DIR/" + odd, odd},
		{"percent", "DIR/%41%zz.db", "%41%zz.db"},
		{"uri", "file:DIR/a.db", "a.db"},
		{"uri //", "file://DIR/a.db", "a.db"},
		{"uri //localhost", "file://localhostDIR/a.db?mode=rwc", "a.db"},
		{"escapes", fileURI("DIR/"+odd, "mode=rwc"), odd},
		{"question mark", "file:DIR/a%3Fb%3dc%25.db", "a?b=c%.db"},
		{"relative", "a b.db", "a b.db"},
		{"relative uri", "file:a%20b.db", "a b.db"},
		{"parameters", "file:DIR/a.db?mode=rwc&immutable=0&_synchronous=NORMAL&_busy_timeout=7000&cache=shared", "a.db"},
		{"short parameters", "file:DIR/a.db?_sync=2&_timeout=7000&cache=private", "a.db"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			t.Chdir(dir)
			dsn := strings.Replace(c.dsn, "DIR", dir, 1)
			for range 2 { // made, and opened again
				s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: dsn})
				fileOK(t)(s.Set("k", "a", user{Age: 1}))
				_, ok, err := s.Get("k", "a")
				check(t, err)
				fileEqual(t, "ok", ok, true)
				check(t, s.Close())
				fileEqual(t, "files", fmt.Sprint(slices.Collect(maps.Keys(fileTree(t, dir)))), fmt.Sprint([]string{c.file}))
			}
		})
	}
	t.Run("the forms that an error shows work", func(t *testing.T) {
		for _, path := range []string{"a.db?mode=rwc", "a#b.db?mode=rwc", "100%.db?mode=rwc", "a%20b.db?mode=rwc"} {
			t.Chdir(t.TempDir())
			_, err := fileOpen(path)
			forms := regexp.MustCompile(`file:\S+`).FindAllString(fmt.Sprint(err), -1)
			fileEqual(t, "forms", len(forms), 2)
			for i, name := range []string{strings.TrimSuffix(path, "?mode=rwc"), path} {
				fileOK(t)(fileOpen(strings.TrimSuffix(forms[i], ",")))
				fileOK(t)(os.Stat(name))
			}
		}
	})
	deep := strings.Repeat("long/", 60)
	for _, c := range []struct {
		name, dsn string
		parts     []string
	}{
		{"none", "", []string{"DSN"}},
		{"question mark", "DIR/a?b.db", []string{"DIR/a?b.db", "file:DIR/a"}},
		{"parameters of a path", "DIR/a.db?mode=ro", []string{"file:DIR/a.db?mode=ro"}},
		{"parameters of memory", ":memory:?cache=shared", []string{":memory:?cache=shared", "file:"}},
		{"mode", "file:DIR/a.db?mode=bad", []string{"DIR/a.db", "mode", "bad"}},
		{"mode memory", "file:DIR/a.db?mode=memory", []string{"DIR/a.db", "mode", "memory"}},
		{"unknown", "file:DIR/a.db?mode=rwc&_journal_mode=WAL", []string{"DIR/a.db", "_journal_mode"}},
		{"unknown vfs", "file:DIR/a.db?vfs=unix", []string{"vfs"}},
		{"immutable", "file:DIR/a.db?immutable=maybe", []string{"immutable", "maybe"}},
		{"synchronous", "file:DIR/a.db?_sync=7", []string{"_sync", "7"}},
		{"one of two", "file:DIR/a.db?_sync=none&_synchronous=OFF", []string{"_sync", "none"}},
		{"no synchronous", "file:DIR/a.db?_sync=", []string{"_sync"}},
		{"parameter's escape", "file:DIR/a.db?_sync=1&%zz=1", []string{"%zz"}},
		{"semicolon", "file:DIR/a.db?mode=rwc;_sync=8", []string{"semicolon"}},
		{"timeout", "file:DIR/a.db?_busy_timeout=-5", []string{"_busy_timeout", "-5"}},
		{"a host", "file://hostDIR/a.db", []string{`"host"`}},
		{"a user", "file://me@localhostDIR/a.db", []string{"user"}},
		{"escape", "file:DIR/%zz.db", []string{"DIR/%zz.db"}},
		{"missing directory", "DIR/none/a.db", []string{"DIR/none/a.db"}},
		{"missing directory, long path", "DIR/" + deep + "a.db", []string{"DIR/" + deep + "a.db"}},
		{"a NUL byte", "DIR/a\x00b.db", []string{"NUL"}}, // SQLite would make DIR/a
		{"a NUL byte, escaped", "file:DIR/a%00b.db", []string{"DIR/a%00b.db", "NUL"}},
		{"a directory", "DIR", []string{"DIR"}},
		{"no directory", "DIR/a.db/", []string{"DIR/a.db/"}},
		{"no directory, dot", "DIR/a.db/.", []string{"DIR/a.db/."}},
		{"missing directory, parent", "DIR/none/../a.db", []string{"DIR/none/../a.db"}},
		{"absent rw", "file:DIR/a.db?mode=rw", []string{"DIR/a.db"}},
		{"absent ro", "file:DIR/a.db?mode=ro", []string{"DIR/a.db"}},
		{"absent immutable", "file:DIR/a.db?immutable=1", []string{"DIR/a.db"}},
	} {
		t.Run("refused "+c.name, func(t *testing.T) {
			dir := t.TempDir()
			for i := range c.parts {
				c.parts[i] = strings.ReplaceAll(c.parts[i], "DIR", dir)
			}
			s, err := fileOpen(strings.Replace(c.dsn, "DIR", dir, 1))
			check(t, fileBad(err, c.parts...))
			if strings.HasPrefix(c.name, "absent") {
				fileEqual(t, "absent", errors.Is(err, os.ErrNotExist), true)
			}
			if s != nil {
				t.Fatal("a store beside the error")
			}
			fileEqual(t, "files", len(fileTree(t, dir)), 0)
		})
	}
	t.Run("refused no regular file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "fifo")
		check(t, syscall.Mkfifo(path, 0o600))
		for _, params := range []string{"", "mode=ro"} {
			check(t, fileBad(rwErr(fileOpen(fileURI(path, params))), path, "not a regular file"))
		}
	})
	t.Run("parameters have an order", func(t *testing.T) { // so that of two names for one thing the same wins
		_, first := fileOpen("file:a.db?_sync=8&_synchronous=9")
		for range 50 {
			_, err := fileOpen("file:a.db?_synchronous=9&_sync=8")
			fileEqual(t, "error", strings.ReplaceAll(fmt.Sprint(err), "_synchronous=9&_sync=8", "_sync=8&_synchronous=9"), fmt.Sprint(first))
		}
	})
	t.Run("memory is private", func(t *testing.T) {
		for _, dsn := range []string{":memory:", "file::memory:?cache=shared"} {
			t.Chdir(t.TempDir())
			a, b := openSQLite(t, zestor.SQLiteOptions[user]{DSN: dsn}), openSQLite(t, zestor.SQLiteOptions[user]{DSN: dsn})
			fileOK(t)(a.Set("k", "a", user{Age: 1}))
			fileGet(t, 0)(b.Count("k"))
			fileEqual(t, "files", len(fileTree(t, ".")), 0)
		}
	})
	t.Run("the directory may change", func(t *testing.T) {
		dir, other := t.TempDir(), t.TempDir()
		t.Chdir(dir)
		s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: "a.db"})
		fileOK(t)(s.Set("k", "a", user{Age: 1}))
		t.Chdir(other)
		var nest func(depth int) int
		nest = func(depth int) int { // each on a connection of its own
			for e, err := range s.Scan("k", zestor.Range{}) {
				check(t, err)
				if depth > 0 {
					return nest(depth - 1)
				}
				return e.Value.Age
			}
			return 0
		}
		fileEqual(t, "value", nest(9), 1)
		fileOK(t)(s.Set("k", "a", user{Age: 2}))
		fileEqual(t, "files", len(fileTree(t, other)), 0)
	})
}

// fileSyncer counts the fsyncs of a program, each of which takes at least a
// millisecond, and lets one fail if it finds a file, which it removes, or all
// while it finds a directory.
const fileSyncer = `
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/syscall.h>
static int note(int fd, long call) {
	int log = open(getenv("SYNCS"), O_WRONLY | O_APPEND);
	if (log >= 0 && write(log, "s", 1) == 1) close(log);
	if (unlink(getenv("SYNCS_FAIL")) == 0 || errno == EISDIR) { errno = EIO; return -1; }
	usleep(1000); // a disk's, also where /tmp is in memory: who sets meanwhile forms a group
	return syscall(call, fd);
}
int fsync(int fd) { return note(fd, SYS_fsync); }
int fdatasync(int fd) { return note(fd, SYS_fdatasync); }`

var _ = child("file syncs", func(args []string) {
	s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[user]{DSN: args[0], DisableWAL: args[1] == "true"})
	must(err)
	syncs := func(write func()) int64 {
		before, err := os.Stat(os.Getenv("SYNCS"))
		must(err)
		write()
		after, err := os.Stat(os.Getenv("SYNCS"))
		must(err)
		return after.Size() - before.Size()
	}
	sets := func(n int) func() {
		return func() {
			for i := range n {
				must(rwErr(s.Set("k", "a", user{Age: i + 1})))
			}
		}
	}
	syncs(sets(2))
	must(os.Mkdir(os.Getenv("SYNCS_FAIL"), 0o700)) // while there is one connection, which nothing should close
	_, err = s.Set("k", "a", user{Age: -1})
	v, _, _ := s.Get("k", "a")
	must(os.Remove(os.Getenv("SYNCS_FAIL")))
	again, _, got := s.Get("k", "a")
	must(got)
	fmt.Println(v.Age, again.Age, err)
	fmt.Println(syncs(sets(20)))
	for _, write := range []func(key string) error{ // group commit shares them
		func(key string) error { return rwErr(s.Set("l", key, user{})) },
		func(key string) error { return rwErr(s.SetIf("m", key, user{}, 0)) },
		func(key string) error { _, _, err := s.Delete("l", key); return err },
	} {
		fmt.Println(syncs(func() {
			var group sync.WaitGroup
			for g := range 16 {
				group.Go(func() {
					for i := range 20 {
						must(write(fmt.Sprint(g, " ", i)))
					}
				})
			}
			group.Wait()
		}))
	}
	fail := func() { must(os.WriteFile(os.Getenv("SYNCS_FAIL"), nil, 0o600)) }
	fail()
	_, err = s.Set("k", "a", user{Age: -1})
	fmt.Println(err)
	e, _, err := s.GetEntry("k", "a")
	must(err)
	fmt.Println(e.Value.Age)
	var group sync.WaitGroup
	var failed atomic.Int64
	must(s.Update(func(zestor.ReadWriter[user]) error {
		for i := range 16 {
			group.Go(func() {
				if _, err := s.Set("group", fmt.Sprint(i), user{}); err != nil {
					failed.Add(1)
				}
			})
		}
		time.Sleep(50 * time.Millisecond) // most are in one group then
		fail()
		return nil
	}))
	group.Wait()
	os.Remove(os.Getenv("SYNCS_FAIL")) // without synchronous=FULL there was no fsync yet
	n, err := s.Count("group")
	must(err)
	fmt.Println(failed.Load(), 16-n)
	must(rwErr(s.Set("k", "b", user{})))
	must(s.Close())
})

func TestFileDurability(t *testing.T) {
	if _, err := exec.LookPath("gcc"); err != nil || runtime.GOOS != "linux" {
		missing(t, "gcc on Linux")
	}
	dir := t.TempDir()
	lib, source := filepath.Join(dir, "syncer.so"), filepath.Join(dir, "syncer.c")
	check(t, os.WriteFile(source, []byte(fileSyncer), 0o600))
	if out, err := exec.Command("gcc", "-shared", "-fPIC", "-o", lib, source).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for i, c := range []struct {
		params   string
		rollback string
		durable  bool
	}{{"", "", true}, {"", "true", true}, {"_sync=EXTRA", "", true}, {"_synchronous=2", "", true},
		{"_synchronous=NORMAL", "", false}, {"_sync=OFF", "", false}, {"_sync=off", "true", false}} {
		t.Run(c.params+c.rollback, func(t *testing.T) {
			t.Setenv("SYNCS", filepath.Join(dir, fmt.Sprint(i)))
			t.Setenv("SYNCS_FAIL", filepath.Join(dir, "fail"))
			check(t, os.WriteFile(os.Getenv("SYNCS"), nil, 0o600))
			t.Setenv("LD_PRELOAD", lib)
			p := start(t, "file syncs", fileURI(filepath.Join(dir, fmt.Sprint(i, ".db")), c.params), c.rollback)
			refused := p.line(t)
			if c.durable && !strings.HasPrefix(refused, "2 2 zestor: set k/a: ") {
				t.Fatalf("a Set whose fsync fails, as all do: values and error %s", refused)
			}
			syncs, err := strconv.Atoi(p.line(t))
			check(t, err)
			for _, what := range []string{"Set", "SetIf", "Delete"} {
				shared, err := strconv.Atoi(p.line(t))
				if check(t, err); c.params+c.rollback == "" && shared > 160 {
					t.Errorf("%d fsyncs for 320 of %s by 16 goroutines", shared, what)
				}
			}
			failed, age, group := p.line(t), p.line(t), strings.Fields(p.line(t))
			if c.durable != (syncs >= 20) || !c.durable && syncs > 3 {
				t.Fatalf("%d fsyncs for 20 durable Sets", syncs)
			}
			if c.durable && (!strings.HasPrefix(failed, "zestor: set k/a: ") || age != "20") {
				t.Fatalf("a Set whose fsync fails: error %s, value %s", failed, age)
			}
			if c.durable && (group[0] == "0" || group[0] != group[1]) {
				t.Fatalf("a group whose fsync fails: %s errors, %s of 16 Sets are not stored", group[0], group[1])
			}
		})
	}
}

func TestFileReadOnly(t *testing.T) {
	for _, params := range []string{"mode=ro", "immutable=1", "mode=ro&immutable=true"} {
		t.Run(params, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "a.db")
			fileMake(t, path, 100)
			before := fileTree(t, dir)
			s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: fileURI(path, params)})
			defer s.Close()
			n := 0
			for e, err := range s.Scan("k", zestor.Range{}) {
				check(t, err)
				v, ok, err := s.Get("k", e.Key) // nested
				check(t, err)
				fileEqual(t, "value", ok && v == e.Value && v.Age == n, true)
				n++
			}
			fileEqual(t, "scanned", n, 100)
			fileGet(t, 100)(s.Revision())
			for _, o := range []zestor.WatchOption{zestor.WithInitialReplay(), zestor.WithSince(40)} {
				events := watchOn(t, s, "k", o)
				ev, _ := watchNext(t, events)
				for n = 0; ev.Type == zestor.EventCreate; n++ {
					ev, _ = watchNext(t, events)
				}
				fileEqual(t, "end of replay", fmt.Sprint(ev.Type, ev.Revision, ev.Err), fmt.Sprint(zestor.EventSynced, 100, nil))
				if n != 100 && n != 60 {
					t.Fatalf("%d events", n)
				}
			}
			same := user{Age: 1, Name: "xxxxxxx"}
			fileGet(t, zestor.SetUnchanged)(s.Set("k", "0001", same))
			check(t, s.SetMany("k", map[string]user{"0001": same}))
			fileGet(t, 2)(s.SetIf("k", "0001", same, 2))
			existed, _, err := s.Delete("k", "none")
			check(t, err)
			fileEqual(t, "existed", existed, false)
			check(t, fileBad(rwErr(s.Set("k", "0001", user{})), "set k/0001: "))
			check(t, fileBad(rwErr(s.Set("k", "new", user{})), "set k/new: "))
			check(t, fileBad(rwErr(s.Delete("k", "0001")), "delete k/0001: "))
			check(t, fileBad(s.SetMany("k", map[string]user{"new": {}}), "setmany k"))
			check(t, fileBad(s.Update(func(tx zestor.ReadWriter[user]) error {
				tx.Set("k", "new", user{}) // its error can't be ignored
				return nil
			}), "update"))
			fileGet(t, 100)(s.Count("k"))
			if params == "mode=ro" { // sees what others write
				events := watchOn(t, s, "k")
				other := openSQLite(t, zestor.SQLiteOptions[user]{DSN: path})
				fileOK(t)(other.Set("k", "live", user{Age: 7}))
				ev, _ := watchNext(t, events)
				fileEqual(t, "live", ev, zestor.Event[user]{Type: zestor.EventCreate, Kind: "k", Key: "live",
					Value: user{Age: 7}, Version: 1, Revision: 101})
				check(t, s.Update(func(tx zestor.ReadWriter[user]) error { // its snapshot is from its start
					fileOK(t)(other.Set("k", "later", user{}))
					fileGet(t, 101)(tx.Count("k"))
					return nil
				}))
				return
			}
			check(t, s.Close())
			fileSame(t, dir, before)
		})
	}
	t.Run("mode=ro writes nothing", func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "a.db")
		p := start(t, "file writes", path, "10") // leaves a WAL
		fileEqual(t, "acknowledged", p.line(t), "10")
		fileKill(p)
		before := fileTree(t, dir)
		fileEqual(t, "WAL left", len(before["a.db-wal"]) > 0, true)
		s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: fileURI(path, "mode=ro")})
		fileGet(t, 10)(s.Count("k"))
		check(t, fileBad(rwErr(s.Set("k", "new", user{})), "set k/new: "))
		check(t, s.Close())
		fileSame(t, dir, before)

		check(t, os.Truncate(path, 0))
		before = fileTree(t, dir)
		check(t, fileBad(rwErr(fileOpen(fileURI(path, "mode=ro"))), path))
		fileSame(t, dir, before)
	})
}

// file writes sets k/0000 and on, and waits to be killed.
var _ = child("file writes", func(args []string) {
	s, err := fileOpen(args[0])
	must(err)
	n, err := strconv.Atoi(args[1])
	must(err)
	for i := range n {
		must(rwErr(s.Set("k", fmt.Sprintf("%04d", i), user{Age: i})))
	}
	fmt.Println(n)
	select {}
})

// file sql runs statements, and waits after each until it is told to go on.
var _ = child("file sql", func(args []string) {
	db, err := sql.Open("sqlite3", args[0]+"?_busy_timeout=20000")
	must(err)
	db.SetMaxOpenConns(1)
	for _, s := range args[1:] {
		must(rwErr(db.Exec(s)))
		fmt.Println("done")
		fmt.Scanln()
	}
	must(db.Close())
})

const fileOld = `CREATE TABLE zestor_kv (kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, version INTEGER NOT NULL DEFAULT 1, updated_at TEXT NOT NULL DEFAULT (STRFTIME('%Y-%m-%dT%H:%M:%fZ','now')), PRIMARY KEY(kind, key));
	CREATE INDEX idx_kv_kind ON zestor_kv(kind);`

func TestFileRefused(t *testing.T) {
	garbage := make([]byte, 20000)
	rand.NewChaCha8([32]byte{}).Read(garbage)
	cut := func(size int) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			fileMake(t, path, 100)
			check(t, os.Truncate(path, int64(size)))
		}
	}
	run := func(statements ...string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) { fileSQL(t, path, statements...) }
	}
	crash := func(statements ...string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			p := start(t, "file sql", path, strings.Join(statements, ";"))
			p.line(t)
			fileKill(p)
		}
	}
	data := func(data string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) { check(t, os.WriteFile(path, []byte(data), 0o600)) }
	}
	made := func(statements ...string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			fileMake(t, path, 10)
			fileSQL(t, path, statements...)
		}
	}
	type file struct {
		name string
		part string
		make func(t *testing.T, path string)
	}
	files := []file{
		{"garbage", "", data(string(garbage))},
		{"text", "", data("users: alice\n")},
		{"one byte", "", data("x")}, // which has size 0 to SQLite
		{"a header alone", "", data("SQLite format 3\x00")},
		{"a header and garbage", "", data("SQLite format 3\x00" + string(garbage))},
		{"cut in the header", "", cut(60)},
		{"cut in the first page", "", cut(3000)},
		{"cut after the first page", "", cut(4096)},
		{"cut in the middle", "", cut(20000)},
		{"foreign", "zestor_kv", run(`CREATE TABLE t (x)`, `INSERT INTO t VALUES (1)`)},
		{"foreign WAL", "zestor_kv", run(`PRAGMA journal_mode = WAL`, `CREATE TABLE t (x)`)},
		{"foreign, of zestor's version", "zestor_kv", run(`CREATE TABLE t (x)`, `PRAGMA user_version = 1`)},
		{"foreign with a log", "zestor_kv", run(`CREATE TABLE zestor_log (x)`)},
		{"foreign after a crash", "zestor_kv", crash(`PRAGMA journal_mode = WAL`, `CREATE TABLE t (x)`, `INSERT INTO t VALUES (1)`)},
		{"without its table", "no zestor_kv", made(`DROP TABLE zestor_kv`)},
		{"without its table, of no version", "no zestor_kv", made(`DROP TABLE zestor_kv`, `PRAGMA user_version = 0`)},
		{"a version alone", "not a Zestor file", run(`PRAGMA user_version = 1`)},
		{"in UTF-16", "UTF-16le", run(`PRAGMA encoding = 'UTF-16le'`, fileOld)}, // where two keys that are no valid text would be one
		{"newer", "newer", made(`PRAGMA user_version = 1000`)},
		{"newer after a crash", "newer", func(t *testing.T, path string) {
			fileMake(t, path, 10)
			crash(`PRAGMA user_version = 1000`)(t, path)
		}},
		{"newer and empty", "newer", run(`PRAGMA user_version = 1000`)},
		{"newer and old", "newer", run(fileOld, `PRAGMA user_version = 1000`)},
		{"other columns", "columns", run(`CREATE TABLE zestor_kv (kind TEXT, key TEXT, value BLOB, PRIMARY KEY (kind, key))`)},
		{"a column more", "columns", run(fileOld, `ALTER TABLE zestor_kv ADD COLUMN x`)},
		{"a generated column more", "columns", run(fileOld, `ALTER TABLE zestor_kv ADD COLUMN x AS (length(value))`)},
		{"other key", "columns", run(strings.Replace(fileOld, "PRIMARY KEY(kind, key)", "PRIMARY KEY(key)", 1))},
		{"a view", "", run(`CREATE TABLE t (x)`, `CREATE VIEW zestor_kv AS SELECT x AS kind FROM t`)},
	}
	// What lacks a trigger, or has another log, would lose changes or repeat revisions.
	for _, damage := range []string{`DROP TRIGGER zestor_insert`, `DROP TRIGGER zestor_update`, `DROP TRIGGER zestor_keep`,
		`ALTER TABLE zestor_log ADD COLUMN note`, `ALTER TABLE zestor_kv ADD COLUMN note`} {
		for version := range 2 { // 0 in a file that was dumped and read again
			files = append(files, file{fmt.Sprint(damage, version), "not a Zestor file", made(damage, fmt.Sprint("PRAGMA user_version = ", version))})
		}
	}
	for _, c := range files {
		for _, params := range []string{"", "mode=rw", "mode=ro"} {
			t.Run(c.name+" "+params, func(t *testing.T) {
				dir := t.TempDir()
				path := filepath.Join(dir, "a.db")
				c.make(t, path)
				before := fileTree(t, dir)
				dsn := path
				if params != "" {
					dsn = fileURI(path, params)
				}
				fileSoon(t, func() error {
					_, err := fileOpen(dsn)
					return fileBad(err, path, c.part)
				})
				fileSame(t, dir, before)
			})
		}
	}
}

func TestFileBecomesStore(t *testing.T) {
	for name, before := range map[string]func(t *testing.T, path string){
		"absent":         func(t *testing.T, path string) {},
		"no bytes":       func(t *testing.T, path string) { check(t, os.WriteFile(path, nil, 0o600)) },
		"no tables":      func(t *testing.T, path string) { fileSQL(t, path, `VACUUM`) },
		"no tables, WAL": func(t *testing.T, path string) { fileSQL(t, path, `PRAGMA journal_mode = WAL`) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "a.db")
			before(t, path)
			for i := range 3 {
				s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: path})
				fileGet(t, int64(i))(s.Revision())
				fileOK(t)(s.Set("k", "a", user{Age: i}))
				check(t, s.Close())
			}
		})
	}
}

func TestFileJournalMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	for i, c := range []struct {
		disable bool
		before  string
		want    string
	}{
		{false, "", "wal"}, {true, "", "wal"}, // an existing one keeps its mode
		{true, "PRAGMA journal_mode = DELETE", "delete"}, {false, "", "wal"}, {true, "new", "delete"}, {true, "", "delete"},
	} {
		if c.before == "new" {
			check(t, os.Remove(path))
		} else {
			fileSQL(t, path, c.before)
		}
		s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[user]{DSN: path, DisableWAL: c.disable})
		check(t, err)
		fileOK(t)(s.Set("k", "a", user{Age: i + 1}))
		check(t, s.Close())
		fileEqual(t, fmt.Sprint("mode after step ", i), fileQuery(t, path, `PRAGMA journal_mode`), c.want)
	}
}

// fileOldest makes a file of the multi-package Zestor with n rows.
func fileOldest(t testing.TB, path, mode string, n int) {
	t.Helper()
	fileSQL(t, path, `PRAGMA journal_mode = `+mode, fileOld, fmt.Sprintf(`WITH RECURSIVE c(i) AS (SELECT 0 UNION ALL SELECT i+1 FROM c WHERE i+1 < %d)
		INSERT INTO zestor_kv SELECT substr('Zaé', i%%3+1, 1), printf('key %%04d', i), '{"Age":'||i||'}', i+1,
			strftime('%%Y-%%m-%%dT%%H:%%M:%%fZ', 1e9+i, 'unixepoch') FROM c`, n))
}

// fileUpgraded says whether a file of fileOldest has become what it should.
func fileUpgraded(path string, n int) error {
	s, err := fileOpen(path)
	if err != nil {
		return err
	}
	defer s.Close()
	revision := int64(0)
	for _, kind := range []string{"Z", "a", "é"} {
		for e, err := range s.Scan(kind, zestor.Range{}) {
			if err != nil {
				return err
			}
			revision++
			i := e.Value.Age
			want := zestor.Entry[user]{Kind: string([]rune("Zaé")[i%3]), Key: fmt.Sprintf("key %04d", i), Value: user{Age: i},
				Version: int64(i) + 1, Revision: revision, UpdatedAt: time.Unix(1e9+int64(i), 0).UTC()}
			if e != want {
				return fmt.Errorf("upgraded to %v, want %v", e, want)
			}
		}
	}
	if newest, err := s.Revision(); err != nil || newest != revision || revision != int64(n) {
		return fmt.Errorf("%d entries, revision %d, want %d: %w", revision, newest, n, err)
	}
	return nil
}

var _ = child("file upgrades", func(args []string) {
	n, err := strconv.Atoi(args[1])
	must(err)
	fmt.Println("ready")
	fmt.Scanln()
	must(fileUpgraded(args[0], n))
	fmt.Println("done")
})

var _ = child("file in 16 MiB", func(args []string) {
	db, err := sql.Open("sqlite3", ":memory:")
	must(err)
	_, err = db.Exec(`PRAGMA hard_heap_limit = 16777216`) // of all connections of the process
	must(err)
	s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[string]{DSN: args[0], Codec: watchRaw})
	must(err)
	fmt.Println("opened")
	fmt.Scanln()
	for _, text := range []string{"a", "b"} {
		values := make(map[string]string)
		for i := range 32 {
			values[fmt.Sprint(i)] = strings.Repeat(text, 1<<20)
		}
		must(s.SetMany("k", values))
	}
	must(s.Close())
	fmt.Println("done")
})

func TestFileUpgrade(t *testing.T) {
	for _, mode := range []string{"WAL", "DELETE"} {
		t.Run(mode, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "a.db")
			fileOldest(t, path, mode, 100)
			before := fileTree(t, dir)
			for _, params := range []string{"mode=ro", "immutable=1"} {
				check(t, fileBad(rwErr(fileOpen(fileURI(path, params))), path, "upgrade"))
			}
			fileSame(t, dir, before)
			check(t, fileUpgraded(path, 100))
			check(t, fileUpgraded(path, 100)) // once is enough
			fileEqual(t, "integrity", fileQuery(t, path, `PRAGMA integrity_check`), "ok")

			s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: path})
			for _, since := range []int64{0, 1, 50, 99, 101} {
				if _, err := s.Watch(t.Context(), "a", zestor.WithSince(since)); !errors.Is(err, zestor.ErrCompacted) {
					t.Fatalf("since %d: %v", since, err)
				}
			}
			events := watchOn(t, s, "a", zestor.WithSince(100))
			ev, _ := watchNext(t, events)
			fileEqual(t, "synced", fmt.Sprint(ev.Type, ev.Revision), "synced100")
			fileOK(t)(s.Set("a", "key 0001", user{Age: -1}))
			fileSQL(t, path, `DELETE FROM zestor_kv WHERE key = 'key 0004'`)
			ev, _ = watchNext(t, events)
			fileEqual(t, "update", ev, zestor.Event[user]{Type: zestor.EventUpdate, Kind: "a", Key: "key 0001",
				Value: user{Age: -1}, Version: 3, Revision: 101})
			ev, _ = watchNext(t, events)
			fileEqual(t, "delete", ev, zestor.Event[user]{Type: zestor.EventDelete, Kind: "a", Key: "key 0004",
				Value: user{Age: 4}, Version: 5, Revision: 102})
		})
		t.Run("no rows "+mode, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "a.db")
			fileOldest(t, path, mode, 1)
			fileSQL(t, path, `DELETE FROM zestor_kv`)
			check(t, fileUpgraded(path, 0))
			s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: path})
			fileOK(t)(s.Watch(t.Context(), "a", zestor.WithSince(0)))
		})
		t.Run("odd rows "+mode, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "a.db")
			fileSQL(t, path, `PRAGMA journal_mode = `+mode, fileOld, `INSERT INTO zestor_kv (kind, key, value) VALUES ('', 'a', '1'), (x'6b', 'a', '1')`,
				`INSERT INTO zestor_kv (kind, key, value, version) VALUES ('k', 'a', '1', 9223372036854775807)`)
			s := openSQLite(t, zestor.SQLiteOptions[int]{DSN: path})
			before := rwEntry(t, s, "k", "a")
			events := watchOn(t, s, "k")
			fileEqual(t, "result", fmt.Sprint(rwT(s.Set("k", "a", 2))...), fmt.Sprint(rwT(zestor.SetUpdated, nil)...))
			fileSQL(t, path, `UPDATE zestor_kv SET value = '3'`) // of all three
			fileOK(t)(s.Set("k", "a", 4))
			resumed := watchOn(t, s, "k", zestor.WithSince(3))
			for _, ch := range []<-chan zestor.Event[int]{events, resumed} {
				for i := range 3 {
					ev, _ := watchNext(t, ch)
					fileEqual(t, "change", fmt.Sprint(ev.Type, ev.Value, ev.Version-before.Version, ev.Err), fmt.Sprint(zestor.EventUpdate, i+2, i+1, nil))
				}
			}
		})
		t.Run("failed "+mode, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "a.db")
			fileOldest(t, path, mode, 3000)
			fileSQL(t, path, `CREATE TRIGGER t AFTER UPDATE ON zestor_kv WHEN NEW.key = 'key 2999' BEGIN SELECT RAISE(ABORT, 'no way'); END`)
			before := fileTree(t, dir)
			check(t, fileBad(rwErr(fileOpen(path)), path, "no way"))
			fileSame(t, dir, before)
			p := start(t, "file limited open", path, fmt.Sprint(100<<10)) // it has no space
			if err := p.line(t); !strings.Contains(err, path) {
				t.Fatalf("without space: %s", err)
			}
			p.line(t)
			fileSame(t, dir, before)
			fileSQL(t, path, `DROP TRIGGER t`)
			p = start(t, "file limited open", path, fmt.Sprint(100<<10))
			if err := p.line(t); !strings.Contains(err, path) {
				t.Fatalf("without space: %s", err)
			}
			p.line(t)
			check(t, fileUpgraded(path, 3000))
		})
		t.Run("analyzed when it was short "+mode, func(t *testing.T) {
			took := map[bool]time.Duration{}
			for _, analyzed := range []bool{false, true} {
				path := filepath.Join(t.TempDir(), "a.db")
				fileOldest(t, path, mode, 8000)
				if analyzed {
					fileSQL(t, path, `ANALYZE`, `UPDATE sqlite_stat1 SET stat = '2 1 1'`)
				}
				begin := time.Now()
				s, err := fileOpen(path)
				took[analyzed] = time.Since(begin)
				check(t, err)
				check(t, s.Close())
			}
			if took[true] > 10*took[false] {
				t.Fatalf("%v instead of %v", took[true], took[false])
			}
		})
		t.Run("killed "+mode, func(t *testing.T) {
			for range fileMore(4, 30) {
				path := filepath.Join(t.TempDir(), "a.db")
				fileOldest(t, path, mode, 3000)
				p := start(t, "file upgrades", path, "3000")
				p.line(t)
				fmt.Fprintln(p.in)
				time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond) // then kill it
				fileKill(p)
				check(t, fileUpgraded(path, 3000))
			}
		})
		t.Run("together "+mode, func(t *testing.T) {
			for n := range fileMore(3, 30) {
				n *= 50 // at first an absent file
				path := filepath.Join(t.TempDir(), "a.db")
				if n > 0 {
					fileOldest(t, path, mode, n)
				}
				var all []*process
				for range 4 {
					p := start(t, "file upgrades", path, fmt.Sprint(n))
					p.line(t)
					all = append(all, p)
				}
				for _, p := range all {
					fmt.Fprintln(p.in)
				}
				for _, p := range all {
					fileEqual(t, "child", p.line(t), "done")
				}
			}
		})
	}
	t.Run("large", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "a.db")
		fileOldest(t, path, "WAL", 1500)
		fileSQL(t, path, `UPDATE zestor_kv SET value = value || printf('%20000c', ' ')`)
		p := start(t, "file in 16 MiB", path)
		fileEqual(t, "child", p.line(t), "opened")
		fileKill(p)
		check(t, fileUpgraded(path, 1500))
	})
}

func TestFileWithoutCgo(t *testing.T) {
	goTool, err := exec.LookPath("go")
	if err != nil {
		missing(t, "go")
	}
	here, err := os.Getwd()
	check(t, err)
	sums, err := os.ReadFile("go.sum")
	check(t, err)
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.sum": string(sums),
		"go.mod": "module try\n\ngo 1.25\n\nrequire github.com/zestor-dev/zestor v0.0.0\n\nreplace github.com/zestor-dev/zestor => " + strconv.Quote(here),
		"main.go": `package main

import (
	"fmt"

	"github.com/zestor-dev/zestor"
)

func main() {
	s := zestor.NewMemStore(zestor.StoreOptions[int]{})
	s.Set("k", "a", 1)
	fmt.Println(s.Get("k", "a"))
	_, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[int]{DSN: "a.db"})
	fmt.Println(err)
}`} {
		check(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, goTool, "run", "-mod=mod", ".")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	out, err := cmd.CombinedOutput()
	lines := strings.Split(string(out), "\n")
	if err != nil || len(lines) != 3 || lines[0] != "1 true <nil>" || !strings.Contains(lines[1], "zestor: ") || !strings.Contains(lines[1], "cgo") {
		t.Fatalf("%v\n%s", err, out)
	}
}

// Trust: killed, full, broken.

// fileOp is one step of a writer that is to be killed: what it changes, in
// order. A nil age deletes.
type fileOp struct {
	kind, key string
	age       *int
}

func fileOps(prefix string, i int) []fileOp {
	key := prefix + fmt.Sprintf("%06d", i)
	switch i % 5 {
	case 0:
		return []fileOp{{"a", key, &i}}
	case 1:
		return []fileOp{{"a", key + "/0", &i}, {"a", key + "/1", &i}, {"a", key + "/2", &i}}
	case 2:
		return []fileOp{{"a", key, &i}, {"b", key, &i}, {"a", key + "/2", &i}}
	case 3:
		return []fileOp{{"b", prefix + "last", &i}}
	}
	return []fileOp{{"a", prefix + fmt.Sprintf("%06d", i-4), nil}}
}

// file killed writes until it is killed, and acknowledges what has returned.
var _ = child("file killed", func(args []string) {
	s, err := fileOpen(args[0])
	must(err)
	writers, _ := strconv.Atoi(args[2])
	for g := range writers {
		go func() {
			prefix := fmt.Sprintf("%s-%d-", args[1], g)
			for i := 0; ; i++ {
				ops, err := fileOps(prefix, i), error(nil)
				switch i % 5 {
				case 1:
					many := map[string]user{}
					for _, op := range ops {
						many[op.key] = user{Age: *op.age}
					}
					err = s.SetMany("a", many)
				case 2:
					err = s.Update(func(tx zestor.ReadWriter[user]) error {
						for _, op := range ops {
							if _, err := tx.Set(op.kind, op.key, user{Age: *op.age}); err != nil {
								return err
							}
						}
						return nil
					})
				case 4:
					_, _, err = s.Delete(ops[0].kind, ops[0].key)
				default:
					_, err = s.Set(ops[0].kind, ops[0].key, user{Age: *ops[0].age})
				}
				must(err)
				fmt.Printf("%d %d\n", g, i)
			}
		}()
	}
	select {}
})

type fileKey struct{ kind, key string }

// fileFollow applies to a model what two watches since a revision deliver, and
// fails unless it is each change up to another, once and in order.
func fileFollow(t *testing.T, model map[fileKey]zestor.Entry[user], a, b <-chan zestor.Event[user], since, upTo int64) {
	t.Helper()
	var all []zestor.Event[user]
	for timeout, synced := time.After(fileDeadline), 0; synced < 2 || len(all) < int(upTo-since); {
		var ev zestor.Event[user]
		select {
		case ev = <-a:
		case ev = <-b:
		case <-timeout:
			t.Fatalf("%d of %d changes after %d, %d of 2 watches synced", len(all), upTo-since, since, synced)
		}
		switch check(t, ev.Err); ev.Type {
		case zestor.EventSynced:
			synced++
		default:
			all = append(all, ev)
		}
	}
	slices.SortFunc(all, func(x, y zestor.Event[user]) int { return cmp.Compare(x.Revision, y.Revision) })
	for i, ev := range all {
		key := fileKey{ev.Kind, ev.Key}
		prev, had := model[key]
		want := zestor.Entry[user]{Kind: ev.Kind, Key: ev.Key, Value: ev.Value, Version: prev.Version + 1, Revision: since + int64(i) + 1}
		if ev.Type == zestor.EventDelete {
			want.Version--
			delete(model, key)
		} else {
			model[key] = want
		}
		if ev.Revision != want.Revision || ev.Version != want.Version || had == (ev.Type == zestor.EventCreate) {
			t.Fatalf("change %v after %v, want %v", ev, prev, want)
		}
	}
}

func TestFileKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	model := map[fileKey]zestor.Entry[user]{}
	since, acknowledged := int64(0), 0
	for round := range fileMore(26, 200) {
		writers := 1 + 7*(round/2%2)
		var s zestor.Store[user]
		var a, b <-chan zestor.Event[user]
		look := func() {
			var err error
			s, err = fileOpen(path)
			check(t, err)
			a, b = watchOn(t, s, "a", zestor.WithSince(since)), watchOn(t, s, "b", zestor.WithSince(since))
		}
		if round%2 == 0 {
			look() // the store and its watches are there when the writer is killed
		}
		p := start(t, "file killed", path, fmt.Sprint(round), fmt.Sprint(writers))
		last := make([]int, writers)
		for g := range last {
			last[g] = -1
		}
		for until := rand.IntN(150); p.out.Scan(); until-- {
			var g, i int
			fileOK(t)(fmt.Sscan(p.out.Text(), &g, &i))
			fileEqual(t, "acknowledged", i, last[g]+1)
			last[g] = i
			acknowledged++
			if until <= 0 {
				p.Process.Kill() // what it acknowledged before is read on
			}
		}
		if round%2 == 1 {
			look() // recovers what the killed writer left
		}
		upTo := watchRevision(t, s)
		fileFollow(t, model, a, b, since, upTo)
		since = upTo

		found := map[fileKey]zestor.Entry[user]{}
		for _, kind := range []string{"a", "b"} {
			for e, err := range s.Scan(kind, zestor.Range{}) {
				check(t, err)
				e.UpdatedAt = time.Time{}
				found[fileKey{kind, e.Key}] = e
			}
		}
		if !maps.Equal(found, model) {
			t.Fatalf("round %d: %d entries are not the %d of the watches", round, len(found), len(model))
		}
		for g, i := range last { // all that was acknowledged, and of the next all or nothing
			prefix := fmt.Sprintf("%d-%d-", round, g)
			got, want := map[fileKey]int{}, map[fileKey]int{}
			for key, e := range found {
				if strings.HasPrefix(key.key, prefix) {
					got[key] = e.Value.Age
				}
			}
			step := func(n int) {
				for _, op := range fileOps(prefix, n) {
					if op.age == nil {
						delete(want, fileKey{op.kind, op.key})
					} else {
						want[fileKey{op.kind, op.key}] = *op.age
					}
				}
			}
			for n := range i + 1 {
				step(n)
			}
			if !maps.Equal(got, want) {
				if step(i + 1); !maps.Equal(got, want) {
					t.Fatalf("round %d: writer %d acknowledged %d; the file has %v, want %v", round, g, i, got, want)
				}
			}
		}
		fileEqual(t, "integrity", fileQuery(t, path, `PRAGMA integrity_check`), "ok")
		fileEqual(t, "log", fileQuery(t, path, `SELECT count(*), ifnull(min(revision), 1), ifnull(max(revision), 0) FROM zestor_log`),
			fmt.Sprintf("%d|1|%d", upTo, upTo))
		check(t, s.Close())
	}
	if acknowledged < 100 {
		t.Fatalf("only %d acknowledged", acknowledged)
	}
}

// A WAL that a crash left is recovered up to where it is whole.
func TestFileBrokenWAL(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.db")
	p := start(t, "file writes", path, "60")
	p.line(t)
	fileKill(p)
	left := fileTree(t, dir)
	random := rand.New(rand.NewPCG(1, 2))
	partial := 0
	for i := range fileMore(40, 400) {
		path := filepath.Join(t.TempDir(), "b.db")
		wal := []byte(left["a.db-wal"])
		at := random.IntN(len(wal))
		switch {
		case i == 0: // as it is
		case i%2 == 0:
			wal = wal[:at]
		default:
			wal[at] ^= byte(1 + random.IntN(255))
		}
		check(t, os.WriteFile(path, []byte(left["a.db"]), 0o600))
		check(t, os.WriteFile(path+"-wal", wal, 0o600))
		fileSoon(t, func() error {
			s, err := fileOpen(path)
			if err != nil {
				return err
			}
			defer s.Close()
			n, err := s.Revision()
			if err != nil || i == 0 && n != 60 {
				return fmt.Errorf("revision %d: %w", n, err)
			}
			if 0 < n && n < 60 {
				partial++
			}
			next := int64(0)
			for e, err := range s.Scan("k", zestor.Range{}) {
				if next++; err != nil || e.Revision != next || e.Value.Age != int(next-1) {
					return fmt.Errorf("entry %v at %d: %w", e, next, err)
				}
			}
			if next != n {
				return fmt.Errorf("%d entries at revision %d", next, n)
			}
			_, err = s.Set("k", "next", user{})
			return err
		})
		fileEqual(t, "integrity", fileQuery(t, path, `PRAGMA integrity_check`), "ok")
	}
	fileEqual(t, "some are cut in the middle", partial > 5, true)
}

var _ = child("file counts", func(args []string) {
	n, err := strconv.Atoi(args[1])
	must(err)
	s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[int]{DSN: args[0], BusyTimeout: fileDeadline, DisableWAL: args[2] == "true"})
	must(err)
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for range n {
				must(rwErr(s.SetFn("n", "fn", func(v int) (int, error) { return v + 1, nil })))
				err := zestor.ErrConflict
				for errors.Is(err, zestor.ErrConflict) {
					e, _, failed := s.GetEntry("n", "if")
					must(failed)
					_, err = s.SetIf("n", "if", e.Value+1, e.Revision)
				}
				must(err)
			}
		})
	}
	group.Wait()
	must(s.Close())
	fmt.Println("done")
})

func TestFileContention(t *testing.T) {
	for _, rollback := range []bool{false, true} {
		t.Run(fmt.Sprintf("DisableWAL=%t", rollback), func(t *testing.T) {
			s, path := watchFile(t, zestor.SQLiteOptions[int]{DisableWAL: rollback, BusyTimeout: fileDeadline})
			n := fileMore(10, 100)
			check(t, s.SetMany("n", map[string]int{"fn": 0, "if": 0}))
			var all []*process
			for range 4 {
				all = append(all, start(t, "file counts", path, fmt.Sprint(n), fmt.Sprint(rollback)))
			}
			for _, p := range all {
				fileEqual(t, "child", p.line(t), "done")
			}
			for _, key := range []string{"fn", "if"} {
				e := rwEntry(t, s, "n", key)
				fileEqual(t, key, fmt.Sprint(e.Value, e.Version), fmt.Sprint(16*n, 16*n+1))
			}
			fileGet(t, int64(32*n+2))(s.Revision())
		})
	}
}

func TestFileLocked(t *testing.T) {
	t.Parallel() // it waits, most of the time
	path := filepath.Join(t.TempDir(), "a.db")
	fileMake(t, path, 10)
	const timeout = 400 * time.Millisecond
	option := openSQLite(t, zestor.SQLiteOptions[user]{DSN: fileURI(path, "_timeout=1"), BusyTimeout: timeout}) // the option wins
	param := openSQLite(t, zestor.SQLiteOptions[user]{DSN: fileURI(path, "_busy_timeout=400")})
	p := start(t, "file sql", path, "BEGIN IMMEDIATE", "COMMIT")
	p.line(t)
	for name, s := range map[string]zestor.Store[user]{"set": option, "update": param, "setfn": option, "setmany": param} {
		v := user{Age: rand.Int()}
		write := map[string]func() error{
			"set":     func() error { _, err := s.Set("k", "0001", v); return err },
			"setfn":   func() error { _, err := s.SetFn("k", "0001", func(user) (user, error) { return v, nil }); return err },
			"setmany": func() error { return s.SetMany("k", map[string]user{"0001": v}) },
			"update": func() error {
				return s.Update(func(tx zestor.ReadWriter[user]) error { _, err := tx.Set("k", "0001", v); return err })
			},
		}[name]
		fileSoon(t, func() error {
			begin := time.Now()
			err := write()
			if took := time.Since(begin); took < timeout*9/10 || took > 10*timeout {
				return fmt.Errorf("%s fails after %v, not %v: %v", name, took, timeout, err)
			}
			return fileBad(err, "zestor: "+name, "locked")
		})
		_, ok, err := s.Get("k", "0001") // readers don't wait
		check(t, err)
		fileEqual(t, "ok", ok, true)
	}
	var group sync.WaitGroup
	begin, errs := time.Now(), make([]error, 400)
	for i := range errs { // each of many fails after about that time, too
		group.Go(func() {
			_, errs[i] = option.SetFn("k", "0002", func(user) (user, error) { return user{Age: rand.Int()}, nil })
		})
	}
	fileSoon(t, func() error { group.Wait(); return nil })
	for _, err := range errs {
		check(t, fileBad(err, "setfn k/0002", "locked"))
	}
	if took := time.Since(begin); took > 6*timeout {
		t.Errorf("%d writers at once fail after %v, not %v", len(errs), took, timeout)
	}
	group.Go(func() { // begins under the lock, goes on after it
		for err := errors.New("locked"); err != nil; {
			_, err = option.Set("k", "0003", user{Age: rand.Int()})
		}
	})
	fmt.Fprintln(p.in)
	p.line(t)
	fileSoon(t, func() error { group.Wait(); return nil })
	for _, s := range []zestor.Store[user]{option, param} {
		fileOK(t)(s.Set("k", "0001", user{Age: rand.Int()}))
	}
}

// fileFill writes until there is no space, watched all the while; makes space,
// and finds that everything acknowledged is there and the store goes on.
func fileFill(s zestor.Store[user], space func() error) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	events, err := s.Watch(ctx, "k")
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var full []error
	acknowledged := map[string]int{}
	var group sync.WaitGroup
	for g := range 4 {
		group.Go(func() {
			for i := range 10000 {
				key := fmt.Sprintf("%d/%d", g, i)
				_, err := s.Set("k", key, user{Name: strings.Repeat("x", 3000), Age: i})
				mu.Lock()
				if err != nil {
					full = append(full, fileBad(err, "zestor: set k/"+key+": "))
					mu.Unlock()
					return
				}
				acknowledged[key] = i
				mu.Unlock()
			}
		})
	}
	group.Wait()
	if err := errors.Join(full...); err != nil || len(full) != 4 {
		return fmt.Errorf("%d of 4 writers were told that it is full: %w", len(full), err)
	}
	if err := s.SetMany("k", map[string]user{"m": {Name: strings.Repeat("x", 1<<20)}}); fileBad(err, "zestor: setmany k") != nil {
		return fileBad(err, "zestor: setmany k")
	}
	same := func() error {
		list, err := s.List("k")
		for key, age := range acknowledged {
			if v, ok := list[key]; err == nil && (!ok || v.Age != age) {
				err = fmt.Errorf("%s was acknowledged and is %v", key, v.Age)
			}
		}
		if err == nil && len(list) != len(acknowledged) {
			err = fmt.Errorf("%d entries, %d acknowledged", len(list), len(acknowledged))
		}
		return err
	}
	if err := errors.Join(same(), space()); err != nil {
		return err
	}
	if _, err := s.Set("k", "more", user{Age: 1}); err != nil {
		return err
	}
	acknowledged["more"] = 1
	for range acknowledged { // what failed is no event
		select {
		case ev := <-events:
			if age, ok := acknowledged[ev.Key]; !ok || ev.Err != nil || ev.Type != zestor.EventCreate || ev.Value.Age != age {
				return fmt.Errorf("event %s %s %s: %w", ev.Type, ev.Key, ev.Kind, ev.Err)
			}
		case <-time.After(fileDeadline):
			return errors.New("too few events")
		}
	}
	return same()
}

func TestFileDiskFull(t *testing.T) {
	for _, rollback := range []bool{false, true} {
		t.Run(fmt.Sprintf("DisableWAL=%t", rollback), func(t *testing.T) {
			dir := t.TempDir()
			if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", dir).CombinedOutput(); err != nil {
				t.Skipf("mount tmpfs: %v: %s", err, out) // most machines don't allow it; TestFileTooBig does the same
			}
			defer func() { check(t, exec.Command("umount", dir).Run()) }()
			path, ballast := filepath.Join(dir, "a.db"), filepath.Join(dir, "ballast")
			check(t, os.WriteFile(ballast, make([]byte, 7<<20), 0o600))
			s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[user]{DSN: path, DisableWAL: rollback})
			check(t, err)
			fileSoon(t, func() error {
				return errors.Join(fileFill(s, func() error { return os.Remove(ballast) }), s.Close())
			})
			fileEqual(t, "integrity", fileQuery(t, path, `PRAGMA integrity_check`), "ok")
		})
	}
}

// A program in a container may have no directory for temporary files, in
// which SQLite would note how to undo a statement.
func TestFileTemporary(t *testing.T) {
	s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: filepath.Join(t.TempDir(), "a.db")})
	rwEq(t, rwT(s.Set("k", "a", strings.Repeat("old", 1<<20))), zestor.SetCreated, nil)
	check(t, s.Update(func(tx zestor.ReadWriter[string]) error {
		before := rwFiles(t)
		rwEq(t, rwT(tx.Set("k", "a", strings.Repeat("new", 1<<20))), zestor.SetUpdated, nil)
		fileEqual(t, "open files after a Set of much", rwFiles(t), before) // SQLite would close it after COMMIT
		return nil
	}))
}

// fileLimit lets this process make files of so many bytes. It returns what
// takes the limit away.
func fileLimit(size string) func() error {
	signal.Ignore(syscall.SIGXFSZ)
	n, err := strconv.Atoi(size)
	must(err)
	var old syscall.Rlimit
	must(syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old))
	limited := old
	limited.Cur = uint64(n)
	must(syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limited))
	return func() error { return syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old) }
}

var _ = child("file limited open", func(args []string) {
	fileLimit(args[1])
	_, err := fileOpen(args[0])
	fmt.Println(err)
	fmt.Println("done")
})

var _ = child("file limited", func(args []string) {
	s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[user]{DSN: args[0], DisableWAL: args[2] == "true"})
	must(err)
	must(errors.Join(fileFill(s, fileLimit(args[1])), s.Close()))
	fmt.Println("done")
})

// The name takes no memory.
func TestNamesTooLong(t *testing.T) {
	pages, err := syscall.Mmap(-1, 0, 1_000_000_000, syscall.PROT_READ, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	check(t, err)
	defer syscall.Munmap(pages)
	name := unsafe.String(&pages[0], len(pages))
	each(t, func(t *testing.T, s zestor.Store[int]) {
		check(t, fileBad(rwErr(s.Set("k", name, 1)), "zestor: set k/", "too long"))
		check(t, fileBad(rwErr(s.Get(name, "a")), "zestor: get ", "too long"))
	})
}

func TestFileTooBig(t *testing.T) {
	for _, rollback := range []bool{false, true} {
		t.Run(fmt.Sprintf("DisableWAL=%t", rollback), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "a.db")
			p := start(t, "file limited", path, fmt.Sprint(400<<10), fmt.Sprint(rollback))
			fileEqual(t, "child", p.line(t), "done")
			fileEqual(t, "integrity", fileQuery(t, path, `PRAGMA integrity_check`), "ok")
		})
	}
}

var _ = child("file nobody", func(args []string) {
	dir := args[0]
	if os.Getuid() == 0 {
		must(syscall.Setgroups(nil))
		must(syscall.Setgid(65534))
		must(syscall.Setuid(65534))
	}
	at := func(elements ...string) string { return filepath.Join(append([]string{dir}, elements...)...) }
	for _, name := range []string{"new.db", "old.db"} { // in a directory that can't be written
		must(fileBad(rwErr(fileOpen(at("closed", name))), at("closed", name)))
	}
	must(fileBad(rwErr(fileOpen(at("open", "secret.db"))), at("open", "secret.db")))

	s, err := fileOpen(at("open", "readonly.db"))
	must(err)
	v, ok, err := s.Get("k", "0001")
	if must(err); !ok {
		must(errors.New("0001 is gone"))
	}
	must(fileBad(rwErr(s.Set("k", "0001", user{Age: -1})), "set k/0001", at("open", "readonly.db")))
	must(s.SetMany("k", map[string]user{"0001": v})) // is there already
	must(fileBad(s.SetMany("k", map[string]user{"0001": v, "0002": {Age: -1}}), "setmany k"))
	must(s.Close())

	s, err = fileOpen(at("open", "mine.db"))
	must(err)
	acknowledged := user{}
	for i := range 30 {
		switch i {
		case 10: // while the writer is open
			must(os.Chmod(at("open", "mine.db"), 0o444))
		case 20: // while no writer is
			must(s.Close())
			s, err = fileOpen(at("open", "mine.db"))
			must(err)
		}
		_, err := s.Set("k", "a", user{Age: i + 1})
		if err == nil {
			acknowledged.Age = i + 1
		} else {
			must(fileBad(err, "set k/a"))
		}
		if i < 10 {
			must(err)
		} else if i >= 20 && err == nil {
			must(errors.New("a read-only file was written"))
		}
		v, _, err := s.Get("k", "a")
		if must(err); v != acknowledged {
			must(fmt.Errorf("have %v, acknowledged %v", v, acknowledged))
		}
	}
	must(s.Close())
	for _, name := range []string{"mine.db", "mine.db-wal", "mine.db-shm"} { // as the README says
		must(os.Chmod(at("open", name), 0o644))
	}
	s, err = fileOpen(at("open", "mine.db"))
	must(err)
	must(rwErr(s.Set("k", "a", user{Age: -1})))
	must(s.Close())

	s, err = fileOpen(at("open", "moment.db"))
	must(err)
	must(rwErr(s.Set("k", "a", user{Age: 1})))
	next, stop := iter.Pull2(s.Scan("k", zestor.Range{})) // has the one connection
	next()
	must(os.Chmod(at("open", "moment.db"), 0o444))
	next, stopOther := iter.Pull2(s.Scan("k", zestor.Range{})) // opens one that can only read
	next()
	must(os.Chmod(at("open", "moment.db"), 0o644))
	stop()
	stopOther()
	s.Set("k", "a", user{Age: 2}) // finds that out
	must(rwErr(s.Set("k", "a", user{Age: 3})))
	must(s.Close())
	fmt.Println("done")
})

func TestFilePermission(t *testing.T) {
	dir := t.TempDir()
	check(t, os.Chmod(filepath.Dir(dir), 0o755))
	for name, files := range map[string]map[string]os.FileMode{
		"open":   {"old": 0o666, "readonly": 0o444, "secret": 0},
		"closed": {"old": 0o666, "readonly": 0o444}, // read below, by a user who may not be root
	} {
		check(t, os.Mkdir(filepath.Join(dir, name), 0o755))
		for file, mode := range files {
			path := filepath.Join(dir, name, file+".db")
			fileMake(t, path, 10)
			check(t, os.Chmod(path, mode))
		}
		check(t, os.Chmod(filepath.Join(dir, name), map[string]os.FileMode{"open": 0o777, "closed": 0o555}[name]))
		t.Cleanup(func() { os.Chmod(filepath.Join(dir, name), 0o755) })
	}
	before := fileTree(t, filepath.Join(dir, "closed"))
	p := start(t, "file nobody", dir)
	fileEqual(t, "child", p.line(t), "done")
	fileSame(t, filepath.Join(dir, "closed"), before)
}

// Opening waits for BusyTimeout, also if the lock changes hands meanwhile.
func TestFileOpenWaits(t *testing.T) {
	t.Parallel() // it waits, most of the time
	path := filepath.Join(t.TempDir(), "a.db")
	fileSQL(t, path, fileOld, "CREATE TABLE other (x)")
	db := fileDB(t, path)
	exec := func(q string) { check(t, rwErr(db.Exec(q))) }
	exec("PRAGMA cache_size = 2")
	exec("BEGIN IMMEDIATE") // which keeps readers out as soon as the cache is full
	var group sync.WaitGroup
	for range 6 {
		group.Go(func() {
			s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[int]{DSN: path, DisableWAL: true, BusyTimeout: 4 * time.Second})
			if err != nil {
				t.Error(err)
				return
			}
			check(t, s.Close())
		})
	}
	time.Sleep(150 * time.Millisecond) // so that they wait already
	exec("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300) INSERT INTO other SELECT randomblob(4000) FROM n")
	time.Sleep(2400 * time.Millisecond)
	exec("ROLLBACK")
	group.Wait()
}

// A store that writes one long transaction after the other leaves gaps in which others find the file free:
// a store that looks for it each few milliseconds, and SQLite's own wait, which soon looks each 100.
func TestFileLongTransactions(t *testing.T) {
	for _, rollback := range []bool{false, true} {
		t.Run(fmt.Sprintf("DisableWAL=%t", rollback), func(t *testing.T) {
			t.Parallel() // it waits, most of the time
			path := filepath.Join(t.TempDir(), "a.db")
			o := zestor.SQLiteOptions[int]{DSN: path, DisableWAL: rollback}
			long := openSQLite(t, o)
			o.BusyTimeout = 2 * time.Second
			other := openSQLite(t, o)
			db := fileDB(t, path)
			begun, stopped := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(begun)
				for i := 0; ; i++ {
					func() {
						defer func() { recover() }()
						check(t, long.Update(func(tx zestor.ReadWriter[int]) error {
							select {
							case begun <- struct{}{}:
							default:
							}
							time.Sleep(200 * time.Millisecond)
							if i%2 == 0 {
								panic("also such a one is followed by a gap")
							}
							return rwErr(tx.Set("k", "long", i))
						}))
					}()
					select {
					case <-stopped:
						return
					default:
					}
				}
			}()
			for i := range 4 {
				<-begun
				if _, err := other.Set("k", "short", i); err != nil {
					t.Error(err)
				}
				<-begun
				_, err := db.Exec("INSERT INTO zestor_kv (kind, key, value) VALUES ('k', ?, 0)", fmt.Sprint(i))
				if err != nil {
					t.Error(err)
				}
			}
			close(stopped)
			<-begun
		})
	}
}

// The gap is an eighth of what the lock was held for, from 20 ms on and up to 0.1 s; also after a panic, but
// not if nothing was locked. A bubble's clock tells exactly.
func TestFileGap(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	fileMake(t, path, 1)
	for _, c := range []struct {
		name, dsn string
		held, gap time.Duration
	}{
		{"short", path, 20 * time.Millisecond, 0},
		{"long", path, 80 * time.Millisecond, 10 * time.Millisecond},
		{"very long", path, time.Minute, 100 * time.Millisecond},
		{"read-only", fileURI(path, "mode=ro"), time.Minute, 0},
		{"in memory", ":memory:", time.Minute, 0},
		{"locked out", path, 0, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: c.dsn, BusyTimeout: 30 * time.Millisecond})
			defer s.Close() // within the bubble
			update := func() error {
				defer func() { recover() }()
				return s.Update(func(tx zestor.ReadWriter[user]) error {
					time.Sleep(c.held)
					panic("as good as a return")
				})
			}
			if c.held == 0 {
				db := fileDB(t, path)
				defer db.Close()
				check(t, rwErr(db.Exec("BEGIN IMMEDIATE")))
				check(t, fileBad(update(), "BusyTimeout", path))
				check(t, rwErr(db.Exec("ROLLBACK")))
			} else {
				check(t, update())
			}
			start := time.Now()
			check(t, s.Update(func(zestor.ReadWriter[user]) error { return nil }))
			fileEqual(t, c.name, time.Since(start), c.gap)
		})
	}
}

// A bubble's clock is years behind the one by which a gap was set.
func TestFileGapBeforeBubble(t *testing.T) {
	s := openSQLite(t, zestor.SQLiteOptions[int]{DSN: filepath.Join(t.TempDir(), "a.db")})
	check(t, s.Update(func(zestor.ReadWriter[int]) error {
		time.Sleep(900 * time.Millisecond)
		return nil
	}))
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		fileOK(t)(s.Set("k", "a", 1))
		fileEqual(t, "waited", time.Since(start), 100*time.Millisecond)
	})
}

// A write that waits to leave such a gap looks afterwards whether the file is still there.
func TestFileRemovedInTheGap(t *testing.T) {
	t.Parallel() // it waits, most of the time
	path := filepath.Join(t.TempDir(), "a.db")
	s := openSQLite(t, zestor.SQLiteOptions[int]{DSN: path})
	check(t, s.Update(func(tx zestor.ReadWriter[int]) error {
		time.Sleep(900 * time.Millisecond)
		return rwErr(tx.Set("k", "a", 1))
	}))
	first := make(chan error, 1)
	go func() { first <- rwErr(s.Set("k", "b", 1)) }()
	time.Sleep(30 * time.Millisecond)
	check(t, os.Rename(path, path+".old"))
	check(t, fileBad(rwErr(s.Set("k", "c", 1)), "set k/c"))
	<-first
	check(t, os.Rename(path+".old", path))
}

// But a switch to WAL, which others can do without, waits for a second at most.
func TestFileOpenBesideView(t *testing.T) {
	t.Parallel() // it waits, most of the time
	path := filepath.Join(t.TempDir(), "a.db")
	o := zestor.SQLiteOptions[int]{DSN: path, DisableWAL: true, BusyTimeout: time.Hour}
	s := openSQLite(t, o)
	fileOK(t)(s.Set("k", "a", 1))
	rwView(t, s, func(tx zestor.Reader[int]) {
		rwErr(tx.Revision())
		o.DisableWAL = false
		fileSoon(t, func() error {
			other, err := zestor.NewSQLiteStore(o)
			check(t, err)
			rwEq(t, rwT(other.Get("k", "a")), 1, true, nil)
			return other.Close()
		})
	})
}

// A store that does not wait for fsync looks less often whether its file is there.
func TestFileRemovedWithoutFsync(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	s := openSQLite(t, zestor.SQLiteOptions[int]{DSN: "file:" + path + "?_synchronous=NORMAL"})
	fileOK(t)(s.Set("k", "a", -1))
	check(t, os.Remove(path))
	fileSoon(t, func() error {
		for i := 0; ; i++ {
			if _, err := s.Set("k", "a", i); err != nil {
				return fileBad(err, path, "set k/a")
			}
		}
	})
}

// A durable store looks before each write, however soon it comes after the last.
func TestFileRemovedAtOnce(t *testing.T) {
	for range 20 {
		s, path := watchFile(t, zestor.SQLiteOptions[int]{})
		fileOK(t)(s.Set("k", "a", 1))
		fileOK(t)(s.Set("k", "a", 2))
		check(t, os.Remove(path))
		check(t, fileBad(rwErr(s.Set("k", "a", 3)), path, "set k/a"))
	}
}

// A store that could be opened while its directory came and went can write when it is there again.
func TestFileOpenedInTheMoment(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	check(t, os.Mkdir(dir, 0o700))
	fileMake(t, filepath.Join(dir, "a.db"), 1)
	opened := 0
	for range 100 {
		done, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for {
				os.Rename(dir, dir+"gone")
				runtime.Gosched()
				os.Rename(dir+"gone", dir)
				select {
				case <-done:
					return
				case <-time.After(100 * time.Microsecond):
				}
			}
		}()
		s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[user]{DSN: filepath.Join(dir, "a.db"), DisableWAL: true, BusyTimeout: 100 * time.Millisecond})
		close(done)
		<-stopped
		if err == nil {
			opened++
			s.Set("k", "a", user{Age: -opened}) // finds out if the connection can only read, and drops it
			fileOK(t)(s.Set("k", "a", user{Age: opened}))
			check(t, s.Close())
		}
	}
	t.Logf("%d of 100 were opened", opened)
	fileEqual(t, "some were opened", opened > 0, true)
}

// Without WAL and without its directory SQLite takes what a failed commit left for the file's state.
// That is not read, is no event, and not where a watch has come to.
func TestFileCommitWithoutDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	check(t, os.Mkdir(dir, 0o700))
	o := zestor.SQLiteOptions[string]{DSN: filepath.Join(dir, "a.db"), DisableWAL: true}
	a, b := openSQLite(t, o), openSQLite(t, o)
	watchSet(t, a, "k", "x", "old")
	events := watchOn(t, b, "k")
	err := a.Update(func(tx zestor.ReadWriter[string]) error {
		defer os.Rename(dir, dir+"gone")
		return rwErr(tx.Set("k", "x", "new"))
	})
	check(t, fileBad(err, "update"))
	ev, _ := watchNext(t, events)
	rwEq(t, rwT(ev.Type, ev.Revision), zestor.EventError, int64(1))
	check(t, fileBad(rwErr(b.List("k")), "list k"))
	for e, err := range b.Scan("k", zestor.Range{}) {
		check(t, fileBad(err, "scan k"))
		rwEq(t, rwT(e), zestor.Entry[string]{})
	}
	check(t, fileBad(rwErr(b.Set("k", "x", "new")), "set k/x"))
	value, ok, err := b.Get("k", "x")
	check(t, fileBad(err, "get k/x"))
	rwEq(t, rwT(value, ok), "", false)
	entry, ok, err := b.GetEntry("k", "x")
	check(t, fileBad(err, "getentry k/x"))
	rwEq(t, rwT(entry, ok), zestor.Entry[string]{}, false)
	check(t, os.Rename(dir+"gone", dir))
	watchSet(t, b, "k", "y", "other")
	resumed := watchOn(t, b, "k", zestor.WithSince(ev.Revision))
	watchWant(t, resumed, "create y=other v1 r2", "synced r2")
}

func TestFileRemoved(t *testing.T) {
	for _, c := range []struct {
		name    string
		replace bool
		back    bool
	}{{"removed", false, false}, {"replaced", true, false}, {"moved away and back", false, true}} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			path, away := filepath.Join(dir, "a.db"), filepath.Join(dir, "away.db")
			s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: path})
			watchOn(t, s, "k", zestor.WithBufferSize(1)) // nobody reads it: the store goes on looking
			events := watchOn(t, s, "k")
			fileOK(t)(s.Set("k", "a", user{Age: 1}))
			ev, _ := watchNext(t, events)
			fileEqual(t, "event", ev.Revision, 1)
			check(t, os.Rename(path, away))
			var data []byte
			if c.replace {
				other := filepath.Join(dir, "other.db")
				fileMake(t, other, 20)
				read, err := os.ReadFile(other)
				check(t, err)
				data = read
				check(t, os.Rename(other, path))
			}
			var group sync.WaitGroup
			errs := make([]error, 8)
			for i := range errs {
				group.Go(func() {
					if i%2 == 0 {
						_, errs[i] = s.Set("k", "b", user{Age: i})
					} else {
						errs[i] = s.Update(func(tx zestor.ReadWriter[user]) error { _, err := tx.Set("k", "b", user{}); return err })
					}
				})
			}
			fileSoon(t, func() error { group.Wait(); return nil })
			for i, err := range errs {
				check(t, fileBad(err, path, []string{"set k/b", "update"}[i%2]))
			}
			if ev, _ = watchNext(t, events); ev.Type != zestor.EventError || ev.Revision != 1 {
				t.Fatalf("%v, want the watch to end at 1", ev)
			}
			check(t, fileBad(ev.Err, path, "watch k"))
			if _, ok := watchNext(t, events); ok {
				t.Fatal("the watch goes on")
			}
			late := watchOn(t, s, "k")
			if ev, _ = watchNext(t, late); ev.Type != zestor.EventError || ev.Revision != 1 {
				t.Fatalf("%v, want the late watch to end at 1", ev)
			}
			var nest func(depth int)
			nest = func(depth int) { // more connections than are pooled: each reads what was there, or fails
				for e, err := range s.Scan("k", zestor.Range{}) {
					if err != nil {
						check(t, fileBad(err, path, "scan k"))
						return
					}
					fileEqual(t, "scanned", fmt.Sprint(e.Key, e.Value.Age), "a1")
					if depth < 9 {
						nest(depth + 1)
					}
				}
			}
			nest(0)
			for range 9 {
				if v, _, err := s.Get("k", "a"); err != nil {
					check(t, fileBad(err, path, "get k/a"))
				} else {
					fileEqual(t, "value", v.Age, 1)
				}
			}
			if c.back {
				check(t, os.Rename(away, path))
				fileOK(t)(s.Set("k", "b", user{Age: 2}))
				fileGet(t, 2)(s.Count("k"))
				away = path
			}
			fileSoon(t, s.Close)
			if away != path { // SQLite leaves to the mover what belongs to the file
				os.Rename(path+"-wal", away+"-wal")
			}
			kept := openSQLite(t, zestor.SQLiteOptions[user]{DSN: away})
			v, _, err := kept.Get("k", "a")
			check(t, err)
			fileEqual(t, "acknowledged", v.Age, 1)
			check(t, kept.Close())
			if c.replace { // what came in its place is not touched
				now, err := os.ReadFile(path)
				check(t, err)
				fileEqual(t, "the other file is as it was", bytes.Equal(data, now), true)
			}
		})
	}
}

// fileUse calls everything on what may be damaged. Errors name the place.
func fileUse(path string, options zestor.SQLiteOptions[user]) error {
	s, err := zestor.NewSQLiteStore(options)
	if err != nil {
		return fileBad(err, path)
	}
	var bad []error
	judge := func(err error, place string) {
		if err != nil {
			bad = append(bad, fileBad(err, "zestor: "+place))
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	watch := func(opts ...zestor.WatchOption) <-chan zestor.Event[user] {
		events, err := s.Watch(ctx, "k", append(opts, zestor.WithBufferSize(10000))...)
		judge(err, "watch k")
		return events
	}
	live, replay, resume, newest := watch(), watch(zestor.WithInitialReplay()), watch(zestor.WithSince(0)), watch(zestor.WithSince(50))
	for _, key := range []string{"0000", "0050", "0100", "0099"} {
		judge(rwErr(s.Get("k", key)), "get k/"+key)
		judge(rwErr(s.Set("k", key, user{Age: -1})), "set k/"+key)
		judge(rwErr(s.SetIf("k", key+"new", user{}, 0)), "setif k/"+key)
		judge(rwErr(s.Delete("k", key)), "delete k/"+key)
		judge(rwErr(s.SetFn("k", "0002", func(u user) (user, error) { u.Age++; return u, nil })), "setfn k/0002")
	}
	for _, r := range []zestor.Range{{}, {Descending: true}, {Prefix: "00"}} {
		n := 0
		for _, err := range s.Scan("k", r) {
			judge(err, "scan ") // a damaged row may have another kind
			if n++; n > 10000 {
				return errors.New("a Scan without end")
			}
		}
	}
	judge(rwErr(s.List("k")), "list ")
	judge(rwErr(s.Values("k")), "values ")
	judge(rwErr(s.Keys("k")), "keys k")
	judge(rwErr(s.Count("k")), "count k")
	judge(rwErr(s.GetAll()), "getall")
	judge(rwErr(s.Revision()), "revision")
	many := map[string]user{}
	for i := range 120 {
		many[fmt.Sprintf("%04d", i)] = user{Name: strings.Repeat("y", 200), Age: i}
	}
	judge(s.SetMany("k", many), "setmany k")
	judge(s.Update(func(tx zestor.ReadWriter[user]) error {
		for i := range 50 {
			tx.Delete("k", fmt.Sprintf("%04d", i))
		}
		return nil
	}), "update")
	for i, events := range []<-chan zestor.Event[user]{replay, resume, newest} {
		for n, ok := 0, events != nil; ok; n++ {
			var ev zestor.Event[user]
			select {
			case ev, ok = <-events:
				if ok = ok && ev.Type != zestor.EventSynced; ev.Err != zestor.ErrCompacted {
					judge(ev.Err, "watch k")
				}
			case <-time.After(fileDeadline):
				return fmt.Errorf("replay %d stands still", i)
			}
			if n > 10000 {
				return errors.New("a watch without end")
			}
		}
	}
	judge(s.Close(), "close")
	for ok := live != nil; ok; { // what it holds, and its end
		select {
		case _, ok = <-live:
		case <-time.After(fileDeadline):
			return errors.New("a watch outlives its store")
		}
	}
	return errors.Join(bad...)
}

func TestFileDamaged(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.db")
	fileMake(t, path, 100)
	s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: fileURI(path, "_sync=OFF")})
	for i := range 60 { // free pages, too
		check(t, rwErr(s.Delete("k", fmt.Sprintf("%04d", i+30))))
	}
	check(t, s.Close())
	fileSQL(t, path, `DELETE FROM zestor_log WHERE revision < 40`)
	whole, err := os.ReadFile(path)
	check(t, err)
	refused, rounds := 0, fileMore(160, 5000)
	for seed := range rounds {
		random := rand.New(rand.NewPCG(uint64(seed), 0))
		data := bytes.Clone(whole)
		for range 1 + random.IntN(20) {
			at := random.IntN(len(data))
			switch random.IntN(4) {
			case 0: // the header of a page, and its cells' offsets
				at = at&^4095 + random.IntN(40)
			case 1: // the schema
				at = random.IntN(8192)
			}
			data[at] ^= 1 << random.IntN(8)
		}
		if seed%8 == 0 {
			clear(data[len(data)/4096/2*4096:][:4096*(1+random.IntN(3))])
		}
		options := zestor.SQLiteOptions[user]{DSN: fileURI(path, "_sync=OFF"), DisableWAL: seed%2 == 0, BusyTimeout: time.Second}
		check(t, os.WriteFile(path, data, 0o600))
		fileSoon(t, func() error {
			s, err := zestor.NewSQLiteStore(options)
			if err == nil {
				return s.Close()
			}
			refused++
			now, failed := os.ReadFile(path)
			if failed == nil && !bytes.Equal(now, data) {
				failed = errors.New("a refused file was altered")
			}
			if failed = errors.Join(failed, fileBad(err, path)); failed != nil {
				return fmt.Errorf("seed %d: %w", seed, failed)
			}
			return nil
		})
		check(t, os.WriteFile(path, data, 0o600))
		fileSoon(t, func() error {
			if err := fileUse(path, options); err != nil {
				return fmt.Errorf("seed %d: %w", seed, err)
			}
			return nil
		})
		for _, end := range []string{"-wal", "-shm", "-journal"} {
			os.Remove(path + end)
		}
	}
	fileEqual(t, "some are refused, and some are not", 0 < refused && refused < rounds, true)
}

// A page that is damaged in the middle of a kind, or of the log, is an error
// and not its end.
func TestFileDamagedHalfway(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	fileMake(t, path, 1000)
	whole, err := os.ReadFile(path)
	check(t, err)
	for _, leaf := range []byte{10, 13} { // SQLite's types of a leaf of an index, as zestor_kv is, and of a table
		data, pages := bytes.Clone(whole), 0
		for at := 4096; at < len(data); at += 4096 {
			if page := data[at:][:4096]; page[0] == leaf && bytes.Contains(page, []byte("0950")) {
				clear(page)
				pages++
			}
		}
		fileEqual(t, "pages damaged", pages > 0, true)
		check(t, os.WriteFile(path, data, 0o600))
		s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: path})
		entries, failed := 0, error(nil)
		for _, failed = range s.Scan("k", zestor.Range{}) {
			entries++
		}
		_, e1 := s.Keys("k")
		_, e2 := s.Values("k")
		_, e3 := s.List("k")
		_, e4 := s.GetAll()
		_, e5 := s.Watch(t.Context(), "k", zestor.WithInitialReplay())
		_, e6 := s.Watch(t.Context(), "k", zestor.WithSince(0))
		_, e7 := s.Watch(t.Context(), "k", zestor.WithSince(940)) // of so few it looks up each by itself
		for i, err := range []error{failed, e1, e2, e3, e4, e5, e6, e7} {
			if wrong := leaf == 10 == (i < 6); wrong != (err != nil && strings.Contains(err.Error(), "malformed")) || !wrong && err != nil {
				t.Errorf("leaves of type %d, read %d: %v", leaf, i, err)
			}
		}
		fileEqual(t, "some entries come before the error", leaf == 13 || 100 < entries && entries < 960, true)
		check(t, s.Close())
	}
}

// fileResources waits until no more goroutines and open files are left than
// before, but for what an open store may pool.
func fileResources(t testing.TB, pooled int) (settle func()) {
	files, bytes, goroutines := rwFiles(t)+pooled, benchHeap(), runtime.NumGoroutine()
	return func() {
		t.Helper()
		for end := time.Now().Add(fileDeadline / 6); runtime.NumGoroutine() > goroutines || rwFiles(t) > files; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				stacks := make([]byte, 1<<20)
				t.Fatalf("%d goroutines of %d, %d open files of %d\n%s", runtime.NumGoroutine(), goroutines, rwFiles(t), files,
					stacks[:runtime.Stack(stacks, true)])
			}
		}
		if now := benchHeap(); now > bytes+4<<20 {
			t.Fatalf("%d bytes are kept, %d were", now, bytes)
		}
	}
}

func TestFileLeaks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	use := func(i int) {
		s, err := fileOpen(fileURI(path, "_sync=OFF"))
		check(t, err)
		fileOK(t)(s.Set("k", fmt.Sprint(i%100), user{Age: i}))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		events, err := s.Watch(ctx, "k", zestor.WithInitialReplay())
		check(t, err)
		for e, err := range s.Scan("k", zestor.Range{}) {
			check(t, err)
			check(t, s.View(func(tx zestor.Reader[user]) error { _, _, err := tx.Get("k", e.Key); return err }))
			break
		}
		if i%2 == 0 {
			watchNext(t, events)
			cancel()
		}
		check(t, s.Close())
		fileSoon(t, func() error {
			for range events {
			}
			return nil
		})
	}
	use(0)
	settle := fileResources(t, 0)
	for i := range fileMore(100, 1000) {
		use(i)
	}
	settle()
	each(t, func(t *testing.T, s zestor.Store[user]) {
		watch := func(i int) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var chans []<-chan zestor.Event[user]
			for n := range 10 {
				events, err := s.Watch(ctx, "k", []zestor.WatchOption{zestor.WithInitialReplay(), nil}[n%2])
				check(t, err)
				chans = append(chans, events)
			}
			fileOK(t)(s.Set("k", "a", user{Age: i + 2}))
			watchNext(t, chans[i%10])
			cancel()
			for _, events := range chans {
				for ok := true; ok; {
					_, ok = watchNext(t, events)
				}
			}
		}
		check(t, s.SetMany("k", map[string]user{"a": {}, "b": {}}))
		watch(0)
		settle := fileResources(t, 16)
		for i := range fileMore(50, 1000) {
			watch(i)
		}
		settle()
	})
}

func TestFileClose(t *testing.T) {
	settle := fileResources(t, 0)
	each(t, func(t *testing.T, s zestor.Store[user]) {
		many := map[string]user{}
		for i := range 30 {
			many[fmt.Sprint(i)] = user{Age: i}
		}
		check(t, s.SetMany("k", many))
		stuck := watchOn(t, s, "k", zestor.WithInitialReplay())
		stuckLive := watchOn(t, s, "k", zestor.WithBufferSize(100))
		draining := watchOn(t, s, "k", zestor.WithInitialReplay())
		var group, busy sync.WaitGroup
		errs := make(chan error, 100)
		until := func(fn func(i int) error) { // it fails
			busy.Add(1)
			group.Go(func() {
				for i := 0; ; i++ {
					err := fn(i)
					if i == 1 || err != nil && i < 1 {
						busy.Done()
					}
					if err != nil {
						errs <- err
						return
					}
				}
			})
		}
		for g := range 3 {
			until(func(i int) error { _, err := s.Set("k", fmt.Sprint(g), user{Age: 1000 + i}); return err })
			until(func(i int) error {
				return s.Update(func(tx zestor.ReadWriter[user]) error { _, err := tx.Set("l", "a", user{Age: i}); return err })
			})
			until(func(int) error {
				for _, err := range s.Scan("k", zestor.Range{}) {
					if err != nil {
						return err
					}
				}
				return nil
			})
			until(func(int) error {
				for range s.Scan("k", zestor.Range{}) {
					if _, _, err := s.Get("k", "a"); err != nil {
						return err // also while Close waits for the Scan
					}
				}
				return nil
			})
			until(func(int) error {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				_, err := s.Watch(ctx, "k", zestor.WithInitialReplay())
				return err
			})
		}
		group.Go(func() {
			for range draining {
			}
		})
		fileSoon(t, func() error { busy.Wait(); return nil })
		begin := time.Now()
		group.Go(func() { errs <- cmp.Or(s.Close(), zestor.ErrClosed) }) // two at once
		fileSoon(t, s.Close)
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("Close took %v", took)
		}
		fileSoon(t, func() error {
			group.Wait()
			for range stuck {
			}
			for range stuckLive {
			}
			return nil
		})
		close(errs)
		for err := range errs {
			if !errors.Is(err, zestor.ErrClosed) {
				t.Errorf("a call ends with %v", err)
			}
		}
	})
	settle()
}

// The differential fuzz target. Its input is decoded into operations, each of
// which runs on a plain model and on every store: all must say the same.

// modelStore is the contract in plain code: entries in maps, and a list of all
// changes, of which the first has revision 1. A transaction is a copy.
type modelStore[T any] struct {
	zestor.Store[T] // nil: what is not modelled here; for watches see fuzzWatch
	zestor.StoreOptions[T]
	kinds   map[string]map[string]zestor.Entry[T]
	changes []zestor.Event[T]
	done    bool
}

// modelError is what an error has to say.
type modelError struct {
	op    string
	names []string
	cause error // nil: any
}

func (e *modelError) Error() string { return fmt.Sprintf("%s %q: %v", e.op, e.names, e.cause) }

// matches says whether a store's error says it.
func (e *modelError) matches(err error) bool {
	if err == nil || !strings.HasPrefix(err.Error(), "zestor: "+e.op) {
		return false
	}
	for _, name := range e.names {
		quoted := strconv.Quote(name)
		if !strings.Contains(err.Error(), quoted[1:len(quoted)-1]) {
			return false
		}
	}
	return e.cause == nil || errors.Is(err, e.cause) && strings.HasSuffix(err.Error(), ": "+strings.TrimPrefix(e.cause.Error(), "zestor: "))
}

func (m *modelStore[T]) check(op string, names ...string) error {
	switch {
	case m.done:
		return &modelError{op, names, zestor.ErrTxDone}
	case len(names) > 0 && names[0] == "":
		return &modelError{op, names, zestor.ErrKindRequired}
	case len(names) > 1 && names[1] == "":
		return &modelError{op, names, zestor.ErrKeyRequired}
	}
	return nil
}

func (m *modelStore[T]) copy() *modelStore[T] {
	c := &modelStore[T]{StoreOptions: m.StoreOptions, kinds: map[string]map[string]zestor.Entry[T]{}, changes: slices.Clip(m.changes)}
	for kind, entries := range m.kinds {
		c.kinds[kind] = maps.Clone(entries)
	}
	return c
}

func (m *modelStore[T]) Get(kind, key string) (T, bool, error) {
	e, ok := m.kinds[kind][key]
	return e.Value, ok, m.check("get", kind, key)
}

func (m *modelStore[T]) GetEntry(kind, key string) (zestor.Entry[T], bool, error) {
	e, ok := m.kinds[kind][key]
	return e, ok, m.check("getentry", kind, key)
}

func (m *modelStore[T]) List(kind string, filters ...zestor.FilterFunc[T]) (map[string]T, error) {
	list := map[string]T{}
	for key, e := range m.kinds[kind] {
		if !slices.ContainsFunc(filters, func(keep zestor.FilterFunc[T]) bool { return keep != nil && !keep(key, e.Value) }) {
			list[key] = e.Value
		}
	}
	return list, m.check("list", kind)
}

func (m *modelStore[T]) Keys(kind string) ([]string, error) {
	return slices.AppendSeq([]string{}, slices.Values(slices.Sorted(maps.Keys(m.kinds[kind])))), m.check("keys", kind)
}

func (m *modelStore[T]) Values(kind string) ([]zestor.Entry[T], error) {
	entries := []zestor.Entry[T]{}
	for _, key := range slices.Sorted(maps.Keys(m.kinds[kind])) {
		entries = append(entries, m.kinds[kind][key])
	}
	return entries, m.check("values", kind)
}

func (m *modelStore[T]) Count(kind string) (int, error) {
	return len(m.kinds[kind]), m.check("count", kind)
}

func (m *modelStore[T]) GetAll() (map[string]map[string]T, error) {
	all := map[string]map[string]T{}
	for kind := range m.kinds {
		if list, _ := m.List(kind); len(list) > 0 {
			all[kind] = list
		}
	}
	return all, m.check("getall")
}

func (m *modelStore[T]) Scan(kind string, r zestor.Range) iter.Seq2[zestor.Entry[T], error] {
	return func(yield func(zestor.Entry[T], error) bool) {
		entries, _ := m.Values(kind)
		err := m.check("scan", kind)
		if err == nil && r.Limit < 0 {
			err = &modelError{"scan", []string{kind}, nil}
		}
		if err != nil {
			yield(zestor.Entry[T]{}, err)
			return
		}
		if r.Descending {
			slices.Reverse(entries)
		}
		n := 0
		for _, e := range entries {
			past := r.After == "" || e.Key > r.After && !r.Descending || e.Key < r.After && r.Descending
			if !past || !strings.HasPrefix(e.Key, r.Prefix) {
				continue
			}
			if n++; r.Limit > 0 && n > r.Limit || !yield(e, nil) {
				return
			}
		}
	}
}

func (m *modelStore[T]) Revision() (int64, error) {
	return int64(len(m.changes)), m.check("revision")
}

// valid makes the checks that come before anything is written.
func (m *modelStore[T]) valid(op, kind, key string, value T) error {
	err := m.check(op, kind, key)
	if v := reflect.ValueOf(value); err == nil && v.Kind() == reflect.Pointer && v.IsNil() {
		err = &modelError{op, []string{kind, key}, nil}
	}
	if validate := m.ValidateFns[kind]; err == nil && validate != nil && validate(value) != nil {
		err = &modelError{op, []string{kind, key}, validate(value)}
	}
	return err
}

func (m *modelStore[T]) put(op, kind, key string, value T, want *int64) (zestor.SetResult, int64, error) {
	if err := m.valid(op, kind, key, value); err != nil {
		return 0, 0, err
	}
	old, found := m.kinds[kind][key]
	if want != nil && *want != old.Revision {
		return 0, 0, &modelError{op, []string{kind, key}, zestor.ErrConflict}
	}
	if found && (m.CompareFn != nil && m.CompareFn(old.Value, value) || m.CompareFn == nil && reflect.DeepEqual(old.Value, value)) {
		return zestor.SetUnchanged, old.Revision, nil
	}
	if m.kinds[kind] == nil {
		m.kinds[kind] = map[string]zestor.Entry[T]{}
	}
	e := zestor.Entry[T]{Kind: kind, Key: key, Value: value, Version: old.Version + 1, Revision: int64(len(m.changes)) + 1}
	m.kinds[kind][key] = e
	result, what := zestor.SetCreated, zestor.EventCreate
	if found {
		result, what = zestor.SetUpdated, zestor.EventUpdate
	}
	m.changes = append(m.changes, zestor.Event[T]{Type: what, Kind: kind, Key: key, Value: value, Version: e.Version, Revision: e.Revision})
	return result, e.Revision, nil
}

func (m *modelStore[T]) Set(kind, key string, value T) (zestor.SetResult, error) {
	result, _, err := m.put("set", kind, key, value, nil)
	return result, err
}

func (m *modelStore[T]) SetFn(kind, key string, fn func(T) (T, error)) (bool, error) {
	if err := m.check("setfn", kind, key); err != nil {
		return false, err
	}
	old, ok := m.kinds[kind][key]
	if !ok {
		return false, &modelError{"setfn", []string{kind, key}, zestor.ErrKeyNotFound}
	}
	value, err := fn(old.Value)
	if err != nil {
		return false, &modelError{"setfn", []string{kind, key}, err}
	}
	result, _, err := m.put("setfn", kind, key, value, nil)
	return result != zestor.SetUnchanged, err
}

func (m *modelStore[T]) SetMany(kind string, values map[string]T) error {
	err, tx := m.check("setmany", kind), m.copy() // a comparer may panic
	keys := slices.Sorted(maps.Keys(values))
	for i := 0; i < len(keys) && err == nil; i++ {
		err = m.valid("setmany", kind, keys[i], values[keys[i]])
	}
	for i := 0; i < len(keys) && err == nil; i++ {
		tx.put("setmany", kind, keys[i], values[keys[i]], nil)
	}
	m.kinds, m.changes = tx.kinds, tx.changes
	return err
}

func (m *modelStore[T]) SetIf(kind, key string, value T, revision int64) (int64, error) {
	_, newRevision, err := m.put("setif", kind, key, value, &revision)
	return newRevision, err
}

func (m *modelStore[T]) Delete(kind, key string) (bool, T, error) {
	e, ok := m.kinds[kind][key]
	err := m.check("delete", kind, key)
	if ok && err == nil {
		delete(m.kinds[kind], key)
		m.changes = append(m.changes, zestor.Event[T]{Type: zestor.EventDelete, Kind: kind, Key: key, Value: e.Value,
			Version: e.Version, Revision: int64(len(m.changes)) + 1})
	}
	return ok, e.Value, err
}

func (m *modelStore[T]) View(fn func(zestor.Reader[T]) error) error {
	tx := m.copy()
	defer func() { tx.done = true }()
	return fn(struct{ zestor.Reader[T] }{tx})
}

func (m *modelStore[T]) Update(fn func(zestor.ReadWriter[T]) error) error {
	tx := m.copy()
	defer func() { tx.done = true }()
	err := fn(tx)
	if err == nil {
		m.kinds, m.changes = tx.kinds, tx.changes
	}
	return err
}

// What attacks on the library found, kept as tests.

// Of several that open a file which is yet to be made or upgraded, each finds
// it before or after, never in between.
func TestFileOpenedAtOnce(t *testing.T) {
	dir := t.TempDir()
	for round := range 60 {
		path := filepath.Join(dir, fmt.Sprintf("%d.db", round))
		if round%2 == 0 {
			fileSQL(t, path, fileOld, `INSERT INTO zestor_kv (kind, key, value) VALUES ('k', 'a', '"1"')`)
		}
		watchAll(t, 6, func(i int) error {
			time.Sleep(time.Duration(i*round%97) * 10 * time.Microsecond) // at different moments
			s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[string]{DSN: path})
			if err == nil {
				err = s.Close()
			}
			return err
		})
	}
}

// Without WAL, readers wait for writers, not for each other.
func TestFileReadersTogether(t *testing.T) {
	s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: filepath.Join(t.TempDir(), "a.db"), DisableWAL: true})
	var both sync.WaitGroup
	both.Add(2)
	watchAll(t, 2, func(int) error {
		return s.View(func(zestor.Reader[string]) error {
			both.Done()
			both.Wait()
			return nil
		})
	})
}

// SetIf returns the revision of its own change, whatever triggers of the
// file's owner change besides; and those changes are events too.
func TestFileSetIfAmongTriggers(t *testing.T) {
	audit := `CREATE TRIGGER audit AFTER INSERT ON zestor_kv WHEN NEW.kind = 'k' BEGIN
		INSERT INTO zestor_kv (kind, key, value) VALUES ('audit', NEW.key, NEW.value); END;
		CREATE TRIGGER audit2 AFTER UPDATE OF value ON zestor_kv WHEN NEW.kind = 'k' BEGIN
		UPDATE zestor_kv SET value = NEW.value WHERE kind = 'audit' AND key = NEW.key; END;
		CREATE TRIGGER audit3 AFTER DELETE ON zestor_kv WHEN OLD.kind = 'k' BEGIN
		DELETE FROM zestor_kv WHERE kind = 'audit' AND key = OLD.key; END`
	for _, upgraded := range []bool{false, true} { // the triggers come after the store's, or before
		path := filepath.Join(t.TempDir(), "a.db")
		if upgraded {
			fileSQL(t, path, fileOld, audit)
		}
		s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
		if !upgraded {
			fileSQL(t, path, audit)
		}
		events := watchOn(t, s, "audit")
		var revision int64
		for i := range 5 {
			if i < 4 {
				var err error
				revision, err = s.SetIf("k", "a", fmt.Sprint(i), revision)
				check(t, err)
				fileEqual(t, "revision", revision, rwEntry(t, s, "k", "a").Revision)
			} else {
				fileSQL(t, path, `UPDATE zestor_kv SET value = '"4"' WHERE kind = 'k'`)
			}
			ev, _ := watchNext(t, events)
			e := rwEntry(t, s, "audit", "a")
			fileEqual(t, "event", fmt.Sprintln(ev.Value, ev.Version, ev.Revision), fmt.Sprintln(i, i+1, e.Revision))
			fileEqual(t, "audited", fmt.Sprintln(e.Value, e.Version), fmt.Sprintln(i, i+1))
		}
		check(t, rwErr(s.Delete("k", "a")))
		ev, _ := watchNext(t, events)
		fileEqual(t, "event", ev.Type, zestor.EventDelete)
	}
}

// A create is not much dearer because somebody has once asked for the order.
func TestMemIndexIsCheap(t *testing.T) {
	s := zestor.NewMemStore(zestor.StoreOptions[int]{})
	values := make(map[string]int)
	for i := range 200_000 {
		values[fmt.Sprintf("%06d", i)] = i
	}
	check(t, s.SetMany("k", values))
	creates := func(name string) time.Duration {
		start := time.Now()
		for i := range 1000 {
			fileOK(t)(s.Set("k", fmt.Sprintf("%06d%s", i*20, name), 1))
		}
		return time.Since(start)
	}
	before, after := time.Hour, time.Hour // the least of five, since the machine may be busy
	for i := range 5 {
		before = min(before, creates(fmt.Sprint("a", i)))
	}
	for i := range 5 {
		fileEqual(t, "first", rwScan(t, s, "k", zestor.Range{Limit: 1})[0], "000000=0")
		after = min(after, creates(fmt.Sprint("b", i)))
	}
	if after > 50*before {
		t.Fatalf("1000 creates took %v, and %v after a scan", before, after)
	}
	keys, err := s.Keys("k")
	check(t, err)
	fileEqual(t, "sorted", slices.IsSorted(keys), true)
	fileEqual(t, "keys", len(keys), 210_000)
}

// A write that changes nothing writes nothing: neither the log nor the file is
// cut or checkpointed.
func TestFileNoChange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	values := make(map[string]int)
	for i := range 1000 {
		values[fmt.Sprint(i)] = i
	}
	a := openSQLite(t, zestor.SQLiteOptions[int]{DSN: path})
	check(t, a.SetMany("k", values))
	b := openSQLite(t, zestor.SQLiteOptions[int]{DSN: path, HistoryBytes: 1})
	fileOK(t)(b.Set("k", "0", 1)) // a change, which must not count again
	since := watchRevision(t, a)
	values["0"] = 2
	for range 2 {
		values["1"]++
		check(t, a.SetMany("k", values))
	}
	stat := func() (state []any) { // no more, since reading the file would drop SQLite's locks
		for _, name := range []string{path, path + "-wal"} {
			info, err := os.Stat(name)
			check(t, err)
			state = append(state, info.Size(), info.ModTime())
		}
		return state
	}
	before := stat()
	for range 20 {
		check(t, b.SetMany("k", values))
		check(t, b.Update(func(tx zestor.ReadWriter[int]) error { return tx.SetMany("k", values) }))
		fileOK(t)(b.Set("k", "1", 3))
		check(t, rwErr(b.SetIf("k", "1", 3, rwEntry(t, b, "k", "1").Revision)))
		check(t, rwErr(b.SetFn("k", "1", func(n int) (int, error) { return n, nil })))
	}
	rwEq(t, stat(), before...)
	watchOn(t, a, "k", zestor.WithSince(since))
}

// A refused file has nothing beside it that was not there before.
func TestFileRefusedLeavesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	fileSQL(t, path, `PRAGMA journal_mode = WAL`, `PRAGMA user_version = 9`)
	check(t, fileBad(rwErr(fileOpen(path)), path, "newer"))
	rwEq(t, rwT(slices.Collect(maps.Keys(fileTree(t, filepath.Dir(path))))), []string{"a.db"})

	// What a crash has left in a WAL stays there, also where the path is a link.
	db := fileDB(t, path)
	check(t, rwErr(db.Exec(`CREATE TABLE other (a)`)))
	dir := t.TempDir()
	for name, data := range fileTree(t, filepath.Dir(path)) {
		check(t, os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600))
	}
	check(t, db.Close())
	check(t, os.Remove(filepath.Join(dir, "a.db-shm")))
	before := fileTree(t, dir)
	link := filepath.Join(t.TempDir(), "link.db")
	check(t, os.Symlink(filepath.Join(dir, "a.db"), link))
	for _, name := range []string{link, filepath.Join(dir, "a.db")} {
		check(t, fileBad(rwErr(fileOpen(name)), name, "no zestor_kv"))
		fileSame(t, dir, before)
	}
}

// A constraint that somebody has added to the table is an error for who breaks
// it, and no reason to write another key.
func TestFileUnique(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{})
	fileOK(t)(s.Set("users", "alice", "a@x"))
	fileSQL(t, path, `CREATE UNIQUE INDEX emails ON zestor_kv (CAST(value AS TEXT))`)
	check(t, fileBad(rwErr(s.Set("users", "bob", "a@x")), "zestor: set users/bob", "UNIQUE"))
	check(t, fileBad(s.SetMany("users", map[string]string{"bob": "a@x", "carol": "c@x"}), "zestor: setmany users", "UNIQUE"))
	got, err := s.List("users")
	check(t, err)
	fileEqual(t, "users", len(got), 1)
	fileEqual(t, "alice", got["alice"], "a@x")
}

// Writes that SQLite refuses, however many, fail no others that share their transaction, and don't
// keep them from being done.
func TestFileGroupError(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{})
	fileSQL(t, path, `CREATE TRIGGER nope BEFORE INSERT ON zestor_kv WHEN NEW.kind = 'bad' BEGIN SELECT RAISE(ABORT, 'nope'); END`)
	var bad, good sync.WaitGroup
	var stop atomic.Bool
	for range 64 {
		bad.Go(func() {
			for !stop.Load() {
				if _, err := s.Set("bad", "a", "1"); err == nil {
					t.Error("a bad Set did not fail")
					return
				}
			}
		})
	}
	for g := range 7 {
		good.Go(func() {
			for i := range 50 {
				if _, err := s.Set("good", fmt.Sprint(g, i), "1"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	fileSoon(t, func() error { good.Wait(); return nil })
	stop.Store(true)
	bad.Wait()
	fileGet(t, 350)(s.Count("good"))
}

// a path is taken literally, .. behind a symlink too.
func TestFileDotDot(t *testing.T) {
	dir := t.TempDir()
	check(t, os.MkdirAll(filepath.Join(dir, "real", "sub"), 0o755))
	check(t, os.Symlink(filepath.Join(dir, "real", "sub"), filepath.Join(dir, "link")))
	path := dir + "/link/../a.db"
	s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
	s.Set("k", "a", "1")
	if _, err := os.Stat(path); err != nil { // what the system finds there
		t.Fatal(err)
	}
}

// versions that no store writes, in an old file or typed later.
func TestFileOddVersions(t *testing.T) {
	for i, version := range []string{"0", "-1", "'x'", "1.5", "'3'", "5", "0", "-1", "'x'", "1.5", "'3'", "5"} {
		path := filepath.Join(t.TempDir(), "a.db")
		fileSQL(t, path, fileOld+`INSERT INTO zestor_kv (kind, key, value, version) VALUES ('k', 'a', CAST('"1"' AS BLOB), `+version+`)`)
		s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
		if i >= 6 {
			fileSQL(t, path, `UPDATE zestor_kv SET version = `+version)
		}
		events := watchOn(t, s, "k")
		before := rwEntry(t, s, "k", "a")
		fileEqual(t, "version is at least 1", before.Version >= 1, true)
		for i := range int64(2) {
			watchSet(t, s, "k", "a", fmt.Sprint("new", i))
			e := rwEntry(t, s, "k", "a")
			ev, _ := watchNext(t, events)
			if e.Version != before.Version+1+i || ev.Version != e.Version {
				t.Errorf("of version %s: %+v after %+v, and %+v", version, e, before, ev)
			}
		}
	}
}

func TestFileOddTimes(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{})
	watchSet(t, s, "k", "a", "")
	for typed, want := range map[string]time.Time{
		"2024-01-02T03:04:05.678901Z":   time.Date(2024, 1, 2, 3, 4, 5, 678e6, time.UTC),
		"2024-01-02T03:04:05.678+01:00": time.Date(2024, 1, 2, 2, 4, 5, 678e6, time.UTC),
		"yesterday":                     {},
	} {
		fileSQL(t, path, `UPDATE zestor_kv SET updated_at = '`+typed+`'`)
		e, _, err := s.GetEntry("k", "a")
		check(t, err)
		fileEqual(t, typed, e.UpdatedAt, want)
	}
}

// A lock is an error of its own, not a conflict, a gap or an absent key.
func TestFileLockedIsNothingElse(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{DisableWAL: true, BusyTimeout: 100 * time.Millisecond})
	watchSet(t, s, "k", "a", "1")
	s.Set("k", "a", "1") // changes nothing, so that the next Set looks before it writes
	db := fileDB(t, path)
	check(t, rwErr(db.Exec("BEGIN EXCLUSIVE")))
	for name, call := range map[string]func() error{
		"Watch": func() error { _, err := s.Watch(t.Context(), "k", zestor.WithSince(1)); return err },
		"Set":   func() error { return rwErr(s.Set("k", "a", "1")) },
		"SetIf": func() error { return rwErr(s.SetIf("k", "a", "2", 1)) },
		"SetFn": func() error { return rwErr(s.SetFn("k", "a", func(v string) (string, error) { return v, nil })) },
		"View":  func() error { return s.View(func(tx zestor.Reader[string]) error { return rwErr(tx.Count("k")) }) },
	} {
		if err := call(); err == nil || !strings.Contains(err.Error(), "BusyTimeout") || errors.Is(err, zestor.ErrCompacted) {
			t.Errorf("%s: %v", name, err)
		}
	}
	check(t, rwErr(db.Exec("ROLLBACK")))
	watchSet(t, s, "k", "a", "2")
}

// Delete ends, however often its key is set meanwhile, and returns what it has deleted.
func TestDeleteAmongSets(t *testing.T) {
	codec := zestor.NewCodec(json.Marshal, func(data []byte, v any) error {
		time.Sleep(2 * time.Millisecond) // is slower than a Set
		return json.Unmarshal(data, v)
	})
	s := openSQLite(t, zestor.SQLiteOptions[int]{DSN: ":memory:", Codec: codec})
	deletes := watchOn(t, s, "k", zestor.WithEventTypes(zestor.EventDelete))
	stop, sets := make(chan struct{}), sync.WaitGroup{}
	sets.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				s.Set("k", "a", i)
			}
		}
	})
	fileSoon(t, func() error {
		for deleted := 0; deleted < 10; {
			existed, prev, err := s.Delete("k", "a")
			if err != nil {
				return err
			}
			if existed {
				deleted++
				if ev := <-deletes; ev.Value != prev {
					return fmt.Errorf("deleted %d, returned %d", ev.Value, prev)
				}
			}
		}
		return nil
	})
	close(stop)
	sets.Wait()
}

// Also where another caller's goroutine commits for it.
func TestCallbacksRunOnTheirCallersGoroutine(t *testing.T) {
	goroutine := func() string {
		id, _, _ := strings.Cut(string(debug.Stack()), "[")
		return id
	}
	here := func(owner string) {
		if now := goroutine(); now != owner {
			t.Errorf("a callback of %s runs on %s", owner, now)
		}
	}
	codec := zestor.NewCodec(func(v any) ([]byte, error) {
		here(v.(user).Name)
		return json.Marshal(v)
	}, func(data []byte, v any) error {
		err := json.Unmarshal(data, v)
		here(v.(*user).Name)
		return err
	})
	validate := func(v user) error { here(v.Name); return nil }
	s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: filepath.Join(t.TempDir(), "a.db"), Codec: codec,
		StoreOptions: zestor.StoreOptions[user]{ValidateFns: map[string]zestor.ValidateFunc[user]{"k": validate}}})
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			me := goroutine()
			for i := range 30 {
				must(rwErr(s.Set("k", me, user{Name: me, Age: i})))
				e, _, err := s.GetEntry("k", me)
				must(err)
				must(rwErr(s.SetIf("k", me, user{Name: me, Age: -i - 1}, e.Revision)))
				existed, prev, err := s.Delete("k", me)
				must(err)
				if !existed || prev != (user{Name: me, Age: -i - 1}) {
					t.Errorf("deleted %t, %v", existed, prev)
				}
			}
		})
	}
	group.Wait()
}

// A value that is too big spoils nothing else of its Update, and no value is held once it is
// stored or refused.
func TestFileHoldsNoValue(t *testing.T) {
	var held weak.Pointer[byte]
	codec := zestor.NewCodec(func(v any) ([]byte, error) {
		data := make([]byte, v.(int))
		held = weak.Make(&data[0])
		return data, nil
	}, func([]byte, any) error { return nil })
	s := openSQLite(t, zestor.SQLiteOptions[int]{DSN: filepath.Join(t.TempDir(), "a.db"), Codec: codec})
	for name, write := range map[string]func(size int) error{
		"Set":     func(size int) error { return rwErr(s.Set("k", "a", size)) },
		"SetMany": func(size int) error { return s.SetMany("k", map[string]int{"b": size}) },
		"SetMany of a huge value": func(size int) error {
			if s.SetMany("k", map[string]int{"b": 1_000_000_000}) == nil {
				return errors.New("no error")
			}
			return nil
		},
	} {
		if err := write(1 << 20); err != nil {
			t.Fatal(name, err)
		}
		for range 3 {
			runtime.GC()
		}
		if held.Value() != nil {
			t.Errorf("%s: the value is still held", name)
		}
	}
	check(t, s.Update(func(tx zestor.ReadWriter[int]) error {
		if _, err := tx.Set("k", "c", 1_000_000_000); err == nil {
			t.Error("no error in an Update")
		}
		return rwErr(tx.Set("k", "d", 1))
	}))
}

// A connection is closed after a long argument, of which the driver would keep a copy.
func TestFileHoldsNoCopy(t *testing.T) {
	before := rwFiles(t)
	codec := zestor.NewCodec(func(v any) ([]byte, error) { return []byte(v.(string)), nil }, nil)
	s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: fileURI(filepath.Join(t.TempDir(), "a.db"), "_sync=OFF"), Codec: codec})
	for _, size := range []int{17 << 20, 17} {
		long := strings.Repeat("x", size)
		check(t, rwErr(s.Set("k", "a", long+"1")))
		fileEqual(t, "files are open after Set", rwFiles(t) > before, size == 17)
		check(t, s.SetMany("k", map[string]string{"a": long + "2", "b": ""})) // neither the last argument
		fileEqual(t, "files are open after SetMany", rwFiles(t) > before, size == 17)
	}
}

// SetMany takes the memory of few values at once, however long they are.
func TestFileSetManyInLittleMemory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	p := start(t, "file in 16 MiB", path)
	fileEqual(t, "child", p.line(t), "opened")
	fmt.Fprintln(p.in)
	fileEqual(t, "child", p.line(t), "done")
	s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path, Codec: watchRaw})
	for e, err := range s.Scan("k", zestor.Range{}) {
		check(t, err)
		if e.Version != 2 || e.Value != strings.Repeat("b", 1<<20) {
			t.Fatalf("%s has version %d and a value of %d bytes", e.Key, e.Version, len(e.Value))
		}
	}
	fileGet(t, 32)(s.Count("k"))
}

// ownContext is a context that the standard library has not made, and can only wait for.
type ownContext struct {
	context.Context
	done chan struct{}
}

func (c ownContext) Done() <-chan struct{} { return c.done }

func (c ownContext) Err() error {
	select {
	case <-c.done:
		return context.Canceled
	default:
		return nil
	}
}

// lockedContext is a context whose error is under a program's lock.
type lockedContext struct {
	context.Context
	mu sync.Mutex
}

func (c *lockedContext) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.Context.Err()
}

// A writer that holds such a lock, and overflows the watch, does not wait for the watch that waits for the lock.
func TestWatchOfLockedContext(t *testing.T) {
	s := zestor.NewMemStore(zestor.StoreOptions[int]{})
	ctx := &lockedContext{Context: t.Context()}
	_, err := s.Watch(ctx, "k", zestor.WithBufferSize(70))
	check(t, err)
	for i := range 80 { // 64 fill the channel, 6 the queue, one overflows
		ctx.mu.Lock()
		fileOK(t)(s.Set("k", fmt.Sprint(i), i))
		ctx.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	check(t, s.Close())
}

// A context from outside a bubble keeps nothing in it from being idle.
func TestWatchInBubbleOfOuterContext(t *testing.T) {
	outer, cancel := context.WithCancel(t.Context())
	defer cancel()
	outer.Done() // makes its channel
	synctest.Test(t, func(t *testing.T) {
		s := zestor.NewMemStore(zestor.StoreOptions[int]{})
		events, err := s.Watch(outer, "k")
		check(t, err)
		check(t, rwErr(s.Set("k", "a", 1)))
		synctest.Wait()
		fileEqual(t, "events", len(events), 1)
		check(t, s.Close())
	})
}

// What is undelivered when ctx ends is dropped, also under a consumer that keeps pace.
func TestWatchEndsAtOnce(t *testing.T) {
	ctx := ownContext{t.Context(), make(chan struct{})}
	decoded := 0
	codec := zestor.NewCodec(json.Marshal, func(data []byte, v any) error {
		if decoded++; decoded == 100 {
			close(ctx.done)
		}
		return json.Unmarshal(data, v)
	})
	s := openSQLite(t, zestor.SQLiteOptions[int]{DSN: ":memory:", Codec: codec})
	values := make(map[string]int)
	for i := range 1000 {
		values[fmt.Sprint(i)] = i
	}
	check(t, s.SetMany("k", values))
	events, err := s.Watch(ctx, "k", zestor.WithInitialReplay())
	check(t, err)
	n := 0
	for range events {
		n++
	}
	if n > 101 {
		t.Errorf("%d events came, though ctx ended with the 100th", n)
	}
	for range 100 {
		ctx, cancel := context.WithCancel(t.Context())
		events, err := s.Watch(ctx, "k", zestor.WithInitialReplay())
		check(t, err)
		for range rand.IntN(100) {
			<-events
		}
		cancel()
		n := 0
		for range events {
			n++
		}
		if n > 65 {
			t.Fatalf("%d events came after ctx had ended", n)
		}
	}
}

// Without WAL somebody's lock keeps everybody from reading. A watch waits for
// its end, however long that takes.
func TestWatchLockedOut(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{DisableWAL: true, BusyTimeout: 50 * time.Millisecond})
	fileOK(t)(s.Set("k", "a", "1"))
	events := watchOn(t, s, "k")
	db := fileDB(t, path)
	check(t, rwErr(db.Exec(`BEGIN EXCLUSIVE; UPDATE zestor_kv SET value = '"2"'`)))
	for range 5 { // each waits for BusyTimeout, so that the watch has too
		check(t, fileBad(rwErr(s.Get("k", "a")), "zestor: get k/a", "BusyTimeout"))
	}
	check(t, rwErr(db.Exec(`COMMIT`)))
	rwEq(t, rwT(<-events), zestor.Event[string]{Type: zestor.EventUpdate, Kind: "k", Key: "a", Value: "2", Version: 2, Revision: 2})
}

// Nothing of a watch that ends meanwhile waits for that lock.
func TestWatchEndsLockedOut(t *testing.T) {
	s, path := watchFile(t, zestor.SQLiteOptions[string]{DisableWAL: true, BusyTimeout: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	events, err := s.Watch(ctx, "k")
	check(t, err)
	fileOK(t)(s.Set("k", "a", "1"))
	<-events // so that the tail is connected, for which it would wait
	db := fileDB(t, path)
	check(t, rwErr(db.Exec(`BEGIN EXCLUSIVE`)))
	time.Sleep(50 * time.Millisecond) // so that the tail waits already
	cancel()
	for range events {
	}
	fileSoon(t, s.Close)
}

// To a read-only file equal values may be set. A refused write before makes Update fail all the same.
func TestFileReadOnlyUpdate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	fileMake(t, path, 1)
	for _, params := range []string{"mode=ro", "immutable=1", "mode=ro&_timeout=1"} {
		s := openSQLite(t, zestor.SQLiteOptions[user]{DSN: fileURI(path, params)})
		all, err := s.List("k")
		check(t, err)
		check(t, s.Update(func(tx zestor.ReadWriter[user]) error { return tx.SetMany("k", all) }))
		err = s.Update(func(tx zestor.ReadWriter[user]) error {
			check(t, fileBad(rwErr(tx.Set("k", "a", user{})), "readonly"))
			tx.SetMany("k", all)
			return nil
		})
		check(t, fileBad(err, "zestor: update", "readonly"))
	}
}

// While others roll back, who only reads takes them for crashed.
func TestFileReadOnlyAmongRollbacks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	w := openSQLite(t, zestor.SQLiteOptions[string]{DSN: "file:" + path + "?_sync=OFF", DisableWAL: true})
	fileOK(t)(w.Set("k", "a", "1"))
	s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: "file:" + path + "?mode=ro"})
	events := watchOn(t, s, "k")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 10_000 {
			w.Update(func(tx zestor.ReadWriter[string]) error {
				check(t, rwErr(tx.Set("k", "a", "2")))
				return errors.New("no")
			})
		}
	}()
	for reads := 0; ; reads++ {
		select {
		case <-done:
			t.Log(reads, "reads")
			return
		case ev := <-events:
			t.Fatal(ev)
		default:
		}
		rwEq(t, rwT(s.Get("k", "a")), "1", true, nil)
	}
}

// A Scan that outlives its View holds nothing.
func TestScanOutlivesView(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	before := rwFiles(t)
	s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
	check(t, s.SetMany("k", map[string]string{"a": "1", "b": "2"}))
	var nexts []func() (zestor.Entry[string], error, bool)
	for range 20 {
		rwView(t, s, func(tx zestor.Reader[string]) {
			next, stop := iter.Pull2(tx.Scan("k", zestor.Range{}))
			t.Cleanup(stop)
			e, err, ok := next()
			rwEq(t, rwT(e.Key, ok, err), "a", true, nil)
			nexts = append(nexts, next)
		})
	}
	_, err, ok := nexts[0]()
	rwIs(t, err, zestor.ErrTxDone)
	rwEq(t, rwT(ok), true)
	fileOK(t)(s.Set("k", "a", "3"))
	check(t, s.Close())
	rwEq(t, rwT(rwFiles(t)), before)
	rwEq(t, rwT(slices.Collect(maps.Keys(fileTree(t, filepath.Dir(path))))), []string{"a.db"})
	for _, next := range nexts[1:] {
		_, err, _ := next()
		rwIs(t, err, zestor.ErrTxDone)
	}
}

// A watch of large values has no room for many of them.
func TestWatchOfLargeValues(t *testing.T) {
	each(t, func(t *testing.T, s zestor.Store[[4096]byte]) {
		ch := watchOn(t, s, "k")
		if cap(ch) > 4 {
			t.Errorf("an idle watch holds room for %d events", cap(ch))
		}
	})
}

// Without WAL, the wait for this store's own readers leaves BusyTimeout for other processes.
func TestFileLockedAfterView(t *testing.T) {
	t.Parallel() // it waits, most of the time
	a, path := watchFile(t, zestor.SQLiteOptions[string]{DisableWAL: true, BusyTimeout: 500 * time.Millisecond})
	b := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path, DisableWAL: true}) // else it would bring WAL
	watchSet(t, a, "k", "a", "1")
	var calls sync.WaitGroup
	check(t, a.View(func(zestor.Reader[string]) error {
		calls.Go(func() { watchSet(t, a, "k", "a", "2") })
		time.Sleep(600 * time.Millisecond) // for longer than BusyTimeout
		locked := make(chan struct{})
		calls.Go(func() {
			check(t, b.Update(func(zestor.ReadWriter[string]) error {
				close(locked)
				time.Sleep(50 * time.Millisecond)
				return nil
			}))
		})
		<-locked
		return nil
	}))
	calls.Wait()
}

// A lock that is gone makes no later call fail, whatever this store itself does meanwhile.
func TestFileLockIsForgotten(t *testing.T) {
	t.Parallel() // it waits, most of the time
	for _, timeout := range []string{"0", "200"} {
		for name, end := range map[string]func(){"panic": func() { panic("end") }, "Goexit": runtime.Goexit} {
			t.Run(timeout+" "+name, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "a.db")
				s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: "file:" + path + "?_busy_timeout=" + timeout})
				other := openSQLite(t, zestor.SQLiteOptions[string]{DSN: path})
				check(t, other.Update(func(zestor.ReadWriter[string]) error {
					if _, err := s.Set("k", "a", "1"); err == nil || !strings.Contains(err.Error(), "BusyTimeout") {
						t.Error(err)
					}
					return nil
				}))
				begun, ended := make(chan struct{}), make(chan any, 1)
				go func() {
					ended <- rwEnd(func() {
						err := s.Update(func(zestor.ReadWriter[string]) error {
							close(begun)
							time.Sleep(300 * time.Millisecond) // for longer than BusyTimeout
							end()
							return nil
						})
						t.Error(err)
					})
				}()
				select {
				case <-begun:
					watchSet(t, s, "k", "a", "2")
					<-ended
				case how := <-ended:
					t.Error(how)
				}
			})
		}
	}
}

// Without WAL a COMMIT waits for the readers of other processes: for BusyTimeout, even if the call
// has waited for its turn, and many calls at once not one after the other.
func TestFileLockedCommit(t *testing.T) {
	t.Parallel() // it waits, most of the time
	const timeout = 500 * time.Millisecond
	s, path := watchFile(t, zestor.SQLiteOptions[string]{DisableWAL: true, BusyTimeout: timeout})
	watchSet(t, s, "k", "a", "1")
	reader := fileDB(t, path)
	read := func() *sql.Tx {
		tx, err := reader.Begin()
		check(t, err)
		var n int
		check(t, tx.QueryRow(`SELECT count(*) FROM zestor_kv`).Scan(&n))
		return tx
	}
	begun := make(chan struct{})
	var calls sync.WaitGroup
	calls.Go(func() {
		s.Update(func(zestor.ReadWriter[string]) error {
			close(begun)
			time.Sleep(timeout * 6 / 5)
			return nil
		})
	})
	<-begun
	fileOK(t)(s.SetFn("k", "a", func(string) (string, error) {
		tx := read()
		time.AfterFunc(timeout/8, func() { check(t, tx.Rollback()) })
		return "2", nil
	}))
	calls.Wait()
	tx := read()
	begin := time.Now()
	for i := range 100 {
		calls.Go(func() {
			if changed, err := s.SetFn("k", "a", func(string) (string, error) { return fmt.Sprint(i), nil }); err == nil || changed {
				t.Error("SetFn has committed beside a reader", changed)
			}
		})
	}
	calls.Wait()
	if took := time.Since(begin); took > 10*timeout {
		t.Errorf("the last of 100 SetFns fails after %v, not %v", took, timeout)
	}
	check(t, tx.Rollback())
	watchSet(t, s, "k", "a", "3")
}

// Nor does a COMMIT wait only for as long as the first of those that share it still may.
func TestFileLockedGroup(t *testing.T) {
	t.Parallel() // it waits, most of the time
	const timeout = time.Second
	s, path := watchFile(t, zestor.SQLiteOptions[string]{DisableWAL: true, BusyTimeout: timeout})
	watchSet(t, s, "k", "a", "1")
	db := fileDB(t, path)
	db.SetMaxOpenConns(2)
	writer, err := db.Conn(t.Context())
	check(t, err)
	check(t, rwErr(writer.ExecContext(t.Context(), "BEGIN IMMEDIATE")))
	var calls sync.WaitGroup
	calls.Go(func() { s.Set("k", "a", "2") }) // may be too late
	time.Sleep(timeout * 8 / 10)
	calls.Go(func() { watchSet(t, s, "k", "b", "2") })
	time.Sleep(timeout / 20)
	reader, err := db.Begin()
	check(t, err)
	var n int
	check(t, reader.QueryRow(`SELECT count(*) FROM zestor_kv`).Scan(&n))
	check(t, rwErr(writer.ExecContext(t.Context(), "ROLLBACK")))
	time.Sleep(timeout * 4 / 10)
	check(t, reader.Rollback())
	check(t, writer.Close())
	calls.Wait()
}

// A codec that is stuck in one watch holds up nothing else.
func TestWatchStuckCodec(t *testing.T) {
	for _, o := range []zestor.SQLiteOptions[string]{{}, {DisableWAL: true}, {DSN: ":memory:"}} {
		t.Run(fmt.Sprintf("%q without WAL %v", o.DSN, o.DisableWAL), func(t *testing.T) {
			stuck, free := make(chan struct{}), make(chan struct{})
			o.Codec = zestor.NewCodec(json.Marshal, func(data []byte, v any) error {
				if string(data) == `"stuck"` {
					close(stuck)
					<-free
				}
				return json.Unmarshal(data, v)
			})
			if o.DSN == "" {
				o.DSN = filepath.Join(t.TempDir(), "a.db")
			}
			s := openSQLite(t, o)
			first := watchOn(t, s, "a", zestor.WithBufferSize(1))
			second := watchOn(t, s, "b")
			watchSet(t, s, "a", "1", "stuck")
			<-stuck
			watchSet(t, s, "a", "2", "x") // overflows the first watch
			watchSet(t, s, "b", "1", "x")
			watchWant(t, second, "create 1=x v1 r3")
			third := watchOn(t, s, "b", zestor.WithInitialReplay())
			watchWant(t, third, "create 1=x v1 r3", "synced r3")
			watchSet(t, s, "b", "2", "x")
			watchWant(t, second, "create 2=x v1 r4")
			close(free)
			watchWant(t, first, "create 1=stuck v1 r1", "error r1 overflow", "closed")
		})
	}
}

// FuzzStores runs inputs on four types of values. Of the first byte, bits 0 and
// 1 choose the type, 2 a CompareFn, 3 a codec other than JSON, 4 no WAL, 5 and 6
// HistoryBytes, and 7 that the two stores of the file differ in that.
func FuzzStores(f *testing.F) {
	for seed := range 96 {
		r := mathrand.New(mathrand.NewSource(int64(seed)))
		data := make([]byte, 300+r.Intn(200))
		r.Read(data)
		data[0] = byte(seed * 11)
		f.Add(data)
	}
	// A SetMany in Update whose comparer panics at its second key.
	f.Add([]byte("\x04" + strings.Repeat("\x00\x00\x12\x00\x00\x00", 3) +
		"\x06\x00\x02\x00\x01\x01\x03\x00" + "\x0a\x01\x06\x00\x02\x00\x05\x01\x06\x03\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 {
			return
		}
		data = data[:min(len(data), 1000)]
		switch data[0] % 4 {
		case 0:
			fuzzRun(t, data, strconv.Itoa, func(s string) int { n, _ := strconv.Atoi(s); return n })
		case 1:
			fuzzRun(t, data, func(n int) fuzzPair { return fuzzPair{n, string(rune('a' + n))} }, func(p fuzzPair) int { return p.N })
		case 2:
			fuzzRun(t, data, func(n int) map[string]int {
				if n == 0 {
					return nil
				}
				return map[string]int{"n": n, "m": n / 2}
			}, func(m map[string]int) int { return m["n"] })
		case 3:
			fuzzRun(t, data, func(n int) *fuzzPair {
				if n == 7 {
					return nil
				}
				return &fuzzPair{n, "é\u2028<"}
			}, func(p *fuzzPair) int { return p.N })
		}
	})
}

type fuzzPair struct {
	N int
	S string
}

func (p *fuzzPair) String() string { return fmt.Sprint("&", *p) }

var errFuzz = errors.New("refused")

// fuzzer runs one input.
type fuzzer[T any] struct {
	t        *testing.T
	data     []byte
	of       func(n int) T // the eight values: 0 to 7
	number   func(T) int
	codec    zestor.Codec
	opts     zestor.SQLiteOptions[T] // of the file
	wal      bool
	started  time.Time
	level    int // how many operations of the table may be chosen
	depth    int
	model    *modelStore[T]
	memory   *fuzzTarget[T]
	targets  []*fuzzTarget[T] // memory, private, the file, the same file opened again
	watches  []*fuzzWatch[T]
	pulls    []fuzzPull[T]
	steps    []string
	sameSize bool // both stores of the file have the same HistoryBytes
}

type fuzzTarget[T any] struct {
	name  string
	store zestor.Store[T] // nil: not opened yet
	opts  zestor.SQLiteOptions[T]
}

// fuzzOp is a decoded operation. It says what came of it.
type fuzzOp[T any] func(s zestor.ReadWriter[T], say func(...any))

// fuzzOps is the table of operations: reads, writes, transactions, and those
// that run only by themselves, which return nil.
func fuzzOps[T any]() []func(*fuzzer[T]) fuzzOp[T] {
	return []func(*fuzzer[T]) fuzzOp[T]{
		(*fuzzer[T]).get, (*fuzzer[T]).look, (*fuzzer[T]).list, (*fuzzer[T]).scan,
		(*fuzzer[T]).set, (*fuzzer[T]).setFn, (*fuzzer[T]).setMany, (*fuzzer[T]).setIf, (*fuzzer[T]).delete,
		(*fuzzer[T]).view, (*fuzzer[T]).update,
		(*fuzzer[T]).watch, (*fuzzer[T]).drain, (*fuzzer[T]).endWatch, (*fuzzer[T]).reopen, (*fuzzer[T]).pull,
	}
}

const fuzzReads, fuzzWrites, fuzzStoreOps, fuzzAll = 4, 9, 11, 16

func fuzzRun[T any](t *testing.T, data []byte, of func(int) T, number func(T) int) {
	f := &fuzzer[T]{t: t, of: of, number: number, started: time.Now(), codec: zestor.JSON{}, wal: data[0]>>4&1 == 0, sameSize: data[0]>>7 == 0}
	opts := zestor.StoreOptions[T]{ValidateFns: map[string]zestor.ValidateFunc[T]{"k": nil, "checked": func(value T) error {
		switch number(value) {
		case 4:
			panic("validator")
		case 5:
			return errFuzz
		}
		return nil
	}}}
	if data[0]>>2&1 == 1 {
		opts.CompareFn = func(prev, next T) bool {
			if number(prev) == 3 && number(next) == 6 {
				panic("comparer")
			}
			return number(prev)/2 == number(next)/2
		}
	}
	if data[0]>>3&1 == 1 {
		f.codec = zestor.NewCodec(f.marshal, f.unmarshal)
	}
	f.opts = zestor.SQLiteOptions[T]{StoreOptions: opts, Codec: f.codec, DisableWAL: !f.wal,
		HistoryBytes: []int64{0, 600, 1, 0}[data[0]>>5&3]}
	private := f.opts
	f.opts.DSN, private.DSN = "file:"+url.PathEscape(filepath.Join(t.TempDir(), "f.db"))+"?_synchronous=OFF", ":memory:"
	f.model = &modelStore[T]{StoreOptions: opts, kinds: map[string]map[string]zestor.Entry[T]{}}
	second := f.opts
	if !f.sameSize {
		second.HistoryBytes *= 3
	}
	f.memory = &fuzzTarget[T]{name: "memory", store: zestor.NewMemStore(opts)}
	f.targets = []*fuzzTarget[T]{f.memory, {"private", f.new(private), private}, {"file", f.new(f.opts), f.opts}, {"second", nil, second}}
	defer f.close()
	f.data = data[1:]
	for range 3 {
		f.watch()
	}
	for len(f.data) > 0 {
		if op := f.op(fuzzAll); op != nil {
			f.run(op)
		}
	}
	// At the end all is read again, also by the second store of the file, and
	// the watches get some more changes and then end.
	f.data = []byte{1}
	f.run(f.lookAt(fuzzKinds...))
	f.run(func(s zestor.ReadWriter[T], say func(...any)) {
		for i, key := range fuzzKeys {
			say(s.SetMany(fuzzKinds[i%3], map[string]T{key: of(2), "ac": of(i % 3)}))
		}
	})
	f.run(f.lookAt(fuzzKinds...))
	for len(f.watches) > 0 {
		w := f.watches[0]
		f.receive(w, 1<<30)
		f.end(w)
	}
}

func (f *fuzzer[T]) marshal(v any) ([]byte, error) {
	return bytes.Repeat([]byte{'x'}, f.number(v.(T))), nil
}

func (f *fuzzer[T]) unmarshal(data []byte, v any) error {
	if p, ok := v.(*T); ok {
		*p = f.of(len(data))
	} else {
		reflect.ValueOf(v).Elem().Set(reflect.ValueOf(f.of(len(data))).Elem())
	}
	return nil
}

func (f *fuzzer[T]) new(opts zestor.SQLiteOptions[T]) zestor.Store[T] {
	s, err := zestor.NewSQLiteStore(opts)
	check(f.t, err)
	return s
}

func (f *fuzzer[T]) close() {
	f.stopPulls()
	for _, target := range f.targets {
		if target.store != nil {
			if err := target.store.Close(); err != nil {
				f.t.Errorf("%s: %v", target.name, err)
			}
		}
	}
}

func (f *fuzzer[T]) fatalf(format string, args ...any) {
	f.t.Helper()
	f.t.Fatalf("%s\nafter:\n%s", fmt.Sprintf(format, args...), strings.Join(f.steps, "\n"))
}

// The arguments, from the input.

func (f *fuzzer[T]) byte() int {
	if len(f.data) == 0 {
		return 0
	}
	b := f.data[0]
	f.data = f.data[1:]
	return int(b)
}

func fuzzPick[E any](n int, list []E) E { return list[n%len(list)] }

var (
	fuzzKinds = []string{"k", "l\x00'", "checked"}
	fuzzKeys  = []string{"a", "ab", "b\xff", "\xff", "\x00", "a\x00\n", "b"}
)

func (f *fuzzer[T]) kind() string {
	if n := f.byte(); n < 250 {
		return fuzzPick(n, append(fuzzKinds, "k"))
	}
	return ""
}

func (f *fuzzer[T]) key() string {
	if n := f.byte(); n < 250 {
		return fuzzPick(n, append(fuzzKeys, "a", "a", "ab"))
	}
	return ""
}

func (f *fuzzer[T]) value() T { return f.of(f.byte() % 8) }

func (f *fuzzer[T]) prefix() string {
	return fuzzPick(f.byte(), []string{"", "a", "b", "\xff", "b\xff", "a\x00", "", "", "zz", "\xff\xff"})
}

func (f *fuzzer[T]) rangeOf() zestor.Range {
	n := f.byte()
	return zestor.Range{Prefix: f.prefix(), After: fuzzPick(f.byte(), append(fuzzKeys, "", "", "ac", "\xff\xff")),
		Limit: fuzzPick(n/2, []int{0, 0, 1, 2, 3, 0, 100, -1}), Descending: n%2 == 1}
}

// op decodes an operation, one of the first so many of the table.
func (f *fuzzer[T]) op(level int) fuzzOp[T] {
	defer func(level int) { f.level = level; f.depth-- }(f.level)
	f.level = level
	f.depth++
	return fuzzPick(f.byte(), fuzzOps[T]()[:level])(f)
}

// ops decodes a few operations that run inside another.
func (f *fuzzer[T]) ops(level, most int) (list []fuzzOp[T]) {
	for n := f.byte() % (most + 1); f.depth < 4 && n > 0; n-- {
		list = append(list, f.op(level))
	}
	return list
}

// file is the store through which an operation reaches the file.
func (f *fuzzer[T]) file() *fuzzTarget[T] {
	if f.byte()%4 != 1 {
		return f.targets[2]
	}
	second := f.targets[3]
	if second.store == nil {
		second.store = f.new(second.opts)
	}
	return second
}

// run does an operation on the model and the stores, and compares.
func (f *fuzzer[T]) run(op fuzzOp[T]) {
	var want []any
	op(f.model, func(items ...any) { want = append(want, items...) })
	f.steps = append(f.steps, fuzzText(want))
	for _, target := range []*fuzzTarget[T]{f.memory, f.targets[1], f.file()} {
		var got []any
		op(target.store, func(items ...any) { got = append(got, items...) })
		f.compare(target.name, got, want)
	}
}

func fuzzText(items []any) (text string) {
	for _, item := range items {
		if name, ok := item.(string); ok {
			item = strconv.Quote(name)
		}
		text += fmt.Sprintf("%+v ", item)
	}
	return text
}

func (f *fuzzer[T]) compare(name string, got, want []any) {
	f.t.Helper()
	for i := range max(len(got), len(want)) {
		if i >= len(got) || i >= len(want) {
			f.fatalf("%s says %d things, want %d", name, len(got), len(want))
		}
		same := false
		switch g := got[i].(type) {
		case error:
			w, ok := want[i].(*modelError)
			same = ok && w.matches(g) || want[i] == got[i]
		case zestor.Entry[T]:
			same = reflect.DeepEqual(f.timeless(name, g), want[i])
		case []zestor.Entry[T]:
			for i := range g {
				g[i] = f.timeless(name, g[i])
			}
			same = reflect.DeepEqual(got[i], want[i])
		default:
			same = reflect.DeepEqual(got[i], want[i])
		}
		if !same {
			f.fatalf("%s says %s, want %s", name, fuzzText(got[i:i+1]), fuzzText(want[i:i+1]))
		}
	}
}

// timeless checks and removes UpdatedAt.
func (f *fuzzer[T]) timeless(name string, e zestor.Entry[T]) zestor.Entry[T] {
	at := e.UpdatedAt
	if e.Kind != "" && (at.Location() != time.UTC || !at.Equal(at.Truncate(time.Millisecond)) ||
		at.Before(f.started.Add(-time.Second)) || at.After(time.Now().Add(time.Second))) {
		f.fatalf("%s: %s/%s was updated at %v", name, e.Kind, e.Key, at)
	}
	e.UpdatedAt = time.Time{}
	return e
}

// fuzzUnless leaves out results that come with an error.
func fuzzUnless(err error, results ...any) []any {
	if err != nil {
		return []any{err}
	}
	return results
}

// fuzzCatch returns what fn panics with, or nil.
func fuzzCatch(fn func()) (caught any) {
	defer func() { caught = recover() }()
	fn()
	return nil
}

// fuzzGo is fuzzCatch for functions that may also call Goexit.
func fuzzGo(fn func()) any {
	done := make(chan any)
	go func() {
		caught := any("goexit")
		defer func() { done <- caught }()
		caught = fuzzCatch(fn)
	}()
	return <-done
}

// The operations.

func (f *fuzzer[T]) get() fuzzOp[T] {
	kind, key := f.kind(), f.key()
	return func(s zestor.ReadWriter[T], say func(...any)) {
		value, ok, err := s.Get(kind, key)
		say("get", kind, key)
		say(fuzzUnless(err, value, ok)...)
		e, ok, err := s.GetEntry(kind, key)
		say(fuzzUnless(err, e, ok)...)
	}
}

func (f *fuzzer[T]) look() fuzzOp[T] { return f.lookAt(f.kind()) }

func (f *fuzzer[T]) lookAt(kinds ...string) fuzzOp[T] {
	return func(s zestor.ReadWriter[T], say func(...any)) {
		for _, kind := range kinds {
			keys, err := s.Keys(kind)
			say("look", kind)
			say(fuzzUnless(err, keys)...)
			entries, err := s.Values(kind)
			say(fuzzUnless(err, entries)...)
			n, err := s.Count(kind)
			say(fuzzUnless(err, n)...)
		}
		all, err := s.GetAll()
		say(all, err)
		revision, err := s.Revision()
		say(revision, err)
	}
}

func (f *fuzzer[T]) list() fuzzOp[T] {
	kind, prefix, n := f.kind(), f.prefix(), f.byte()
	filters := []zestor.FilterFunc[T]{nil,
		func(_ string, value T) bool { return f.number(value)%2 == n/5%2 },
		func(key string, _ T) bool { return strings.HasPrefix(key, prefix) }}[:n%4]
	if n%5 == 0 {
		filters = []zestor.FilterFunc[T]{func(string, T) bool { panic("filter") }}
	}
	return func(s zestor.ReadWriter[T], say func(...any)) {
		say("list", kind, prefix, n, fuzzCatch(func() {
			list, err := s.List(kind, filters...)
			say(fuzzUnless(err, list)...)
		}))
	}
}

func (f *fuzzer[T]) scan() fuzzOp[T] {
	kind, r, n := f.kind(), f.rangeOf(), f.byte()
	body := f.ops(min(f.level, fuzzStoreOps), 2)
	rounds, last, how := 1+n%2, n/2%8, n/16%4
	return func(s zestor.ReadWriter[T], say func(...any)) {
		all := s.Scan(kind, r)
		for range rounds {
			say("scan", kind, r, how, fuzzCatch(func() {
				n := 0
				for e, err := range all {
					say(e, err)
					if n == last && how == 0 {
						break
					} else if n == last && how == 1 {
						panic("body")
					}
					if len(body) > 0 {
						body[n%len(body)](s, say)
					}
					n++
				}
			}))
		}
	}
}

func (f *fuzzer[T]) set() fuzzOp[T] {
	kind, key, value := f.kind(), f.key(), f.value()
	return func(s zestor.ReadWriter[T], say func(...any)) {
		say("set", kind, key, value, fuzzCatch(func() { say(s.Set(kind, key, value)) }))
	}
}

func (f *fuzzer[T]) setFn() fuzzOp[T] {
	kind, key, n := f.kind(), f.key(), f.byte()
	return func(s zestor.ReadWriter[T], say func(...any)) {
		say("setfn", kind, key, n, fuzzCatch(func() {
			changed, err := s.SetFn(kind, key, func(value T) (T, error) {
				say(value)
				switch n % 8 {
				case 0:
					return value, errFuzz
				case 1:
					panic("fn")
				}
				return f.of((f.number(value) + n/8) % 8), nil
			})
			say(changed, err)
		}))
	}
}

func (f *fuzzer[T]) setMany() fuzzOp[T] {
	kind, values := f.kind(), map[string]T{}
	for range f.byte() % 5 {
		values[f.key()] = f.value()
	}
	return func(s zestor.ReadWriter[T], say func(...any)) {
		say("setmany", kind, values, fuzzCatch(func() { say(s.SetMany(kind, values)) }))
	}
}

func (f *fuzzer[T]) setIf() fuzzOp[T] {
	kind, key, value, n := f.kind(), f.key(), f.value(), f.byte()
	return func(s zestor.ReadWriter[T], say func(...any)) {
		e, _, _ := s.GetEntry(kind, key)
		revision := fuzzPick(n, []int64{e.Revision, e.Revision, e.Revision, 0, e.Revision + 1, e.Revision - 1, -1, 3})
		say("setif", kind, key, value, revision, fuzzCatch(func() { say(s.SetIf(kind, key, value, revision)) }))
	}
}

func (f *fuzzer[T]) delete() fuzzOp[T] {
	kind, key := f.kind(), f.key()
	return func(s zestor.ReadWriter[T], say func(...any)) {
		existed, prev, err := s.Delete(kind, key)
		say("delete", kind, key, existed, prev, err)
	}
}

func (f *fuzzer[T]) update() fuzzOp[T] {
	body, end := f.ops(fuzzWrites, 5), f.byte()
	return func(s zestor.ReadWriter[T], say func(...any)) {
		f.transact(say, body, end, s.(zestor.Store[T]).Update)
	}
}

// view reads while another goroutine writes. That has to wait for the view,
// unless the file has a write-ahead log.
func (f *fuzzer[T]) view() fuzzOp[T] {
	body, end, write := f.ops(fuzzReads, 4), f.byte(), f.set()
	return func(s zestor.ReadWriter[T], say func(...any)) {
		var written []any
		done := make(chan bool)
		f.transact(say, body, end, func(fn func(zestor.ReadWriter[T]) error) error {
			return s.(zestor.Store[T]).View(func(tx zestor.Reader[T]) error {
				_, ok := tx.(zestor.Writer[T])
				say("view", ok)
				go func() {
					defer close(done)
					write(s, func(items ...any) { written = append(written, items...) })
				}()
				if s == f.model || f.wal && (s == f.targets[2].store || s == f.targets[3].store) {
					<-done
				}
				return fn(struct {
					zestor.Reader[T]
					zestor.Writer[T]
				}{tx, nil})
			})
		})
		<-done
		say(written...)
	}
}

// transact runs a body that ends in one of several ways.
func (f *fuzzer[T]) transact(say func(...any), body []fuzzOp[T], end int, run func(func(zestor.ReadWriter[T]) error) error) {
	var kept zestor.ReadWriter[T]
	say("transact", fuzzGo(func() {
		say(run(func(tx zestor.ReadWriter[T]) error {
			kept = tx
			for _, op := range body {
				op(tx, say)
			}
			switch end % 8 {
			case 0:
				return errFuzz
			case 1:
				panic("tx")
			case 2:
				runtime.Goexit()
			}
			return nil
		}))
	}))
	_, _, err := kept.Get("", "")
	say("end", end%8, err)
}

// fuzzPull is a scan that goes on while other operations run.
type fuzzPull[T any] struct {
	name string
	next func() (zestor.Entry[T], error, bool)
	stop func()
}

// pull begins scans on the model and the stores, or takes the next entry of
// those that were begun.
func (f *fuzzer[T]) pull() fuzzOp[T] {
	if len(f.pulls) == 0 {
		kind, r := f.kind(), f.rangeOf()
		f.steps = append(f.steps, fmt.Sprintf("pull %q %+v", kind, r))
		for _, target := range append([]*fuzzTarget[T]{{name: "model", store: f.model}, f.file()}, f.targets[:2]...) {
			next, stop := iter.Pull2(target.store.Scan(kind, r))
			f.pulls = append(f.pulls, fuzzPull[T]{target.name, next, stop})
		}
	}
	we, werr, wok := f.pulls[0].next()
	for _, p := range f.pulls[1:] {
		e, err, ok := p.next()
		f.compare(p.name+" pull", []any{e, err, ok}, []any{we, werr, wok})
	}
	if !wok {
		f.stopPulls()
	}
	return nil
}

func (f *fuzzer[T]) stopPulls() {
	for _, p := range f.pulls {
		p.stop()
	}
	f.pulls = nil
}

// reopen closes one of the stores of the file and opens it again.
func (f *fuzzer[T]) reopen() fuzzOp[T] {
	target := f.file()
	f.steps = append(f.steps, "reopen "+target.name)
	f.stopPulls()
	read := func() (all [][]zestor.Entry[T]) {
		for _, kind := range fuzzKinds {
			entries, err := target.store.Values(kind)
			check(f.t, err)
			all = append(all, entries)
		}
		return all
	}
	before := read()
	check(f.t, target.store.Close())
	var ended []*fuzzWatch[T]
	for _, w := range slices.Clone(f.watches) {
		if w.target == target {
			f.end(w)
			ended = append(ended, w)
		}
	}
	if _, err := target.store.Set("k", "a", f.of(1)); !errors.Is(err, zestor.ErrClosed) {
		f.fatalf("%s is closed, and Set says %v", target.name, err)
	}
	target.store = f.new(target.opts)
	if after := read(); !reflect.DeepEqual(after, before) {
		f.fatalf("%s before and after reopening: %v, %v", target.name, before, after)
	}
	for _, w := range ended {
		f.open(w.next(), w.pos < 0, w.pos, "")
	}
	return nil
}

// fuzzWatch is a watch and what it has to deliver.
type fuzzWatch[T any] struct {
	target             *fuzzTarget[T]
	name, kind, prefix string
	initial            bool
	types              []zestor.EventType
	limit              int
	ch                 <-chan zestor.Event[T]
	cancel             func()
	replay             []zestor.Event[T]
	from               int   // live are the changes after this one
	got                int   // events received
	pos                int64 // up to there w is complete; -1: not even its initial replay
	full               int   // after so many events it may overflow, and the memory store must; or -1
	ended              bool
}

func (w *fuzzWatch[T]) wants(ev zestor.Event[T]) bool {
	return ev.Kind == w.kind && strings.HasPrefix(ev.Key, w.prefix) && (w.types == nil || slices.Contains(w.types, ev.Type))
}

// size is how much of HistoryBytes the changes after a revision take.
func (f *fuzzer[T]) size(since int64) (n int64) {
	for _, ch := range f.model.changes[min(max(since, 0), int64(len(f.model.changes))):] {
		data, err := f.codec.Marshal(ch.Value)
		check(f.t, err)
		n += int64(len(ch.Kind) + len(ch.Key) + len(data) + 64)
	}
	return n
}

// trimmed says whether the change after a revision can be gone from a file,
// and whether it must be.
func (f *fuzzer[T]) trimmed(since int64) (may, must bool) {
	limit, size := f.opts.HistoryBytes, f.size(since)
	may = limit > 0 && size > limit-limit/8 && since < int64(len(f.model.changes))-1
	return may, may && f.sameSize && size > 2*limit+500
}

func (f *fuzzer[T]) watch() fuzzOp[T] {
	kind, prefix, n, limit := f.kind(), f.prefix(), f.byte(), fuzzPick(f.byte(), []int{0, 1, 2, 5, 0})
	types := fuzzPick(f.byte(), [][]zestor.EventType{nil, nil, {zestor.EventCreate}, {zestor.EventUpdate, zestor.EventDelete},
		{zestor.EventDelete, zestor.EventDelete}})
	since := int64(-1)
	if n%4 == 0 {
		since = max(0, int64(len(f.model.changes)-f.byte()%12+1))
	}
	for _, target := range []*fuzzTarget[T]{f.memory, f.targets[1], f.file()} {
		w := &fuzzWatch[T]{target: target, kind: kind, prefix: prefix, types: types, limit: limit}
		f.open(w, n%4 == 1, since, fuzzPick(n/4, []string{"types", "buffer", "since", "ended", 15: ""}))
	}
	return nil
}

// open begins a watch, with a replay or a mistake if wanted.
func (f *fuzzer[T]) open(w *fuzzWatch[T], initial bool, since int64, mistake string) {
	opts := []zestor.WatchOption{nil, zestor.WithPrefix("no"), zestor.WithPrefix(w.prefix)}
	if w.types != nil {
		opts = append(opts, zestor.WithEventTypes(), zestor.WithEventTypes(w.types...))
	}
	if w.limit == 0 {
		w.limit = zestor.DefaultWatchBufferSize
	} else {
		opts = append(opts, zestor.WithBufferSize(1000), zestor.WithBufferSize(w.limit))
	}
	if initial {
		opts = append(opts, zestor.WithInitialReplay())
	}
	if since >= 0 {
		opts = append(opts, zestor.WithSince(0), zestor.WithSince(since))
	}
	ctx, cancel := context.WithCancel(context.Background())
	switch mistake {
	case "types":
		opts = append(opts, zestor.WithEventTypes(zestor.EventCreate, zestor.EventSynced))
	case "buffer":
		opts = append(opts, zestor.WithBufferSize(0))
	case "since":
		opts = append(opts, zestor.WithInitialReplay(), zestor.WithSince(max(since, 0)))
	case "ended":
		cancel()
	}
	w.name = fmt.Sprintf("%s: watch %q %q %v limit %d initial %v since %d %s", w.target.name, w.kind, w.prefix, w.types, w.limit, initial, since, mistake)
	f.steps = append(f.steps, w.name)
	w.from, w.full, w.pos, w.cancel = len(f.model.changes), -1, since, cancel
	var err error
	w.ch, err = w.target.store.Watch(ctx, w.kind, opts...)
	may, must := f.trimmed(since)
	if w.target == f.memory {
		must = since < int64(w.from)
	}
	compacted := errors.Is(err, zestor.ErrCompacted)
	ok := err == nil
	switch {
	case w.kind == "":
		ok = errors.Is(err, zestor.ErrKindRequired)
	case mistake == "ended":
		ok = err == context.Canceled
	case mistake != "":
		ok = err != nil && !compacted
	case since > int64(w.from) || since >= 0 && must:
		ok = compacted
	case since >= 0 && may && compacted:
		ok = true
	}
	if !ok {
		f.fatalf("%s\nat revision %d says %v", w.name, w.from, err)
	}
	if err != nil {
		cancel()
		return
	}
	if initial {
		entries, _ := f.model.Values(w.kind)
		for _, e := range entries {
			w.replay = append(w.replay, zestor.Event[T]{Type: zestor.EventCreate, Kind: e.Kind, Key: e.Key, Value: e.Value, Version: e.Version, Revision: e.Revision})
		}
	} else if since >= 0 {
		w.replay = slices.Clone(f.model.changes[since:])
	}
	w.replay = slices.DeleteFunc(w.replay, func(ev zestor.Event[T]) bool { return !w.wants(ev) })
	if w.initial = initial; !initial && since < 0 {
		w.pos = int64(w.from)
	} else {
		w.replay = append(w.replay, zestor.Event[T]{Type: zestor.EventSynced, Kind: w.kind, Revision: int64(w.from)})
	}
	f.watches = append(f.watches, w)
}

// drain receives all that some watch has to deliver, or a little.
func (f *fuzzer[T]) drain() fuzzOp[T] {
	if n := f.byte(); n%3 == 0 && len(f.watches) > 0 {
		f.receive(fuzzPick(n/3, f.watches), 1+n/3%2)
	} else {
		for _, w := range slices.Clone(f.watches) {
			f.receive(w, 1<<30)
		}
	}
	return nil
}

func (f *fuzzer[T]) endWatch() fuzzOp[T] {
	if n := f.byte(); len(f.watches) > 0 {
		f.end(fuzzPick(n, f.watches))
	}
	return nil
}

// wanted is all that w has to deliver up to now.
func (f *fuzzer[T]) wanted(w *fuzzWatch[T]) []zestor.Event[T] {
	want := slices.Clip(w.replay)
	for _, ch := range f.model.changes[w.from:] {
		if w.wants(ch) {
			want = append(want, ch)
		}
	}
	if n := max(w.got, len(w.replay)) + w.limit; w.full < 0 && len(want) > n {
		w.full = n
	}
	if w.target == f.memory && w.full >= 0 {
		want = want[:w.full]
	}
	return want
}

// receive receives what w has to deliver, at most so many events. Where the
// watch ends with an error, another goes on.
func (f *fuzzer[T]) receive(w *fuzzWatch[T], most int) {
	want, deadline := f.wanted(w), time.After(30*time.Second)
	for w.got < len(want) || w.target == f.memory && w.got == w.full {
		if most--; most < 0 {
			return
		}
		select {
		case ev, ok := <-w.ch:
			if !ok {
				f.fatalf("%s\nclosed after %d of %v", w.name, w.got, want)
			}
			if !f.received(w, ev, want) {
				f.end(w)
				f.open(w.next(), false, w.pos, "")
				return
			}
		case <-deadline:
			f.fatalf("%s\nhangs after %d of %v", w.name, w.got, want)
		}
	}
}

// next is the watch that continues w.
func (w *fuzzWatch[T]) next() *fuzzWatch[T] {
	return &fuzzWatch[T]{target: w.target, kind: w.kind, prefix: w.prefix, types: w.types}
}

// received checks an event. It returns false for an EventError that may come.
func (f *fuzzer[T]) received(w *fuzzWatch[T], ev zestor.Event[T], want []zestor.Event[T]) bool {
	if ev.Type != zestor.EventError {
		if w.got == len(want) || !reflect.DeepEqual(ev, want[w.got]) {
			f.fatalf("%s\nsays %+v after %d of %+v", w.name, ev, w.got, want)
		}
		if w.got++; !w.initial || w.got >= len(w.replay) {
			w.pos = ev.Revision
		}
		return true
	}
	overflow := errors.Is(ev.Err, zestor.ErrWatchOverflow) && w.full >= 0 && w.got >= w.full
	trimmed, _ := f.trimmed(ev.Revision)
	compacted := errors.Is(ev.Err, zestor.ErrCompacted) && w.target != f.memory && trimmed
	replayed := w.got >= len(w.replay) && ev.Revision >= w.pos && ev.Revision <= int64(len(f.model.changes))
	if replayed && (overflow || compacted) && !slices.ContainsFunc(f.model.changes[w.pos:ev.Revision], w.wants) {
		w.ended, w.pos = true, ev.Revision
		return false
	}
	f.fatalf("%s\nends with %+v after %d of %+v, its limit reached after %d", w.name, ev, w.got, want, w.full)
	return false
}

// end ends a watch, if it has not ended: what is undelivered may be dropped.
func (f *fuzzer[T]) end(w *fuzzWatch[T]) {
	f.steps = append(f.steps, "end of "+w.name)
	f.watches = slices.DeleteFunc(f.watches, func(other *fuzzWatch[T]) bool { return other == w })
	w.cancel()
	want, deadline := f.wanted(w), time.After(30*time.Second)
	for {
		select {
		case ev, ok := <-w.ch:
			if !ok {
				return
			}
			if w.ended {
				f.fatalf("%s\nsays %+v after its end", w.name, ev)
			}
			f.received(w, ev, want)
		case <-deadline:
			f.fatalf("%s\ndoes not close", w.name)
		}
	}
}

// Real input: every package of the toolchain that runs the test.

// docPackage is a part of what go list prints.
type docPackage struct {
	ImportPath, Name, Doc string
	Imports               []string
}

type docStore = zestor.Store[docPackage]
type docEvents = []zestor.Event[docPackage]

func TestGoList(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		missing(t, "go")
	}
	output, err := exec.Command("go", "list", "-json", "std").Output()
	check(t, err)
	var packages []docPackage
	for d := json.NewDecoder(strings.NewReader(string(output))); d.More(); {
		var p docPackage
		check(t, d.Decode(&p))
		packages = append(packages, p)
	}
	if len(packages) < 200 {
		t.Fatalf("go list printed only %d packages", len(packages))
	}

	memory := open(t, "memory", zestor.StoreOptions[docPackage]{})
	options := zestor.SQLiteOptions[docPackage]{DSN: filepath.Join(t.TempDir(), "std.db")}
	file := openSQLite(t, options)
	replayed, live := docGoList(t, memory, packages)
	r, l := docGoList(t, file, packages)
	docSame(t, "replayed events of the stores", r, replayed)
	docSame(t, "live events of the stores", l, live)
	entries := docEntries(t, file)
	docSame(t, "entries of the stores", docWithoutTimes(entries), docWithoutTimes(docEntries(t, memory)))
	revision := watchRevision(t, file)

	// The file has it all when it is opened again, history included.
	check(t, file.Close())
	file = openSQLite(t, options)
	docSame(t, "entries after reopening", docEntries(t, file), entries)
	if again, err := file.Revision(); err != nil || again != revision {
		t.Errorf("revision after reopening: %d, %v; was %d", again, err, revision)
	}
	events := watchOn(t, file, "packages", zestor.WithSince(50))
	var resumed docEvents
	for ev := range events {
		if ev.Type == zestor.EventSynced {
			if ev.Revision != revision {
				t.Errorf("synced at %d, want %d", ev.Revision, revision)
			}
			break
		}
		resumed = append(resumed, ev)
	}
	docSame(t, "events after reopening", resumed, live)
}

// docGoList is the main job on one store. It returns what its watches saw,
// after checking that this is what was written.
func docGoList(t *testing.T, s docStore, packages []docPackage) (replayed, live docEvents) {
	t.Helper()
	// What is written goes into a model too: entries by kind and key, and the
	// events of the kind that is watched.
	model := map[string]map[string]zestor.Entry[docPackage]{"packages": {}, "vendored": {}}
	var written docEvents
	var revision int64
	put := func(kind string, p docPackage) {
		revision++
		entry := zestor.Entry[docPackage]{Kind: kind, Key: p.ImportPath, Value: p,
			Version: model[kind][p.ImportPath].Version + 1, Revision: revision}
		model[kind][p.ImportPath] = entry
		if kind == "packages" {
			what := zestor.EventUpdate
			if entry.Version == 1 {
				what = zestor.EventCreate
			}
			written = append(written, docEvent(what, entry))
		}
	}
	remove := func(key string) {
		revision++
		entry := model["packages"][key]
		delete(model["packages"], key)
		entry.Revision = revision
		written = append(written, docEvent(zestor.EventDelete, entry))
	}
	store := func(packages []docPackage, want zestor.SetResult) {
		t.Helper()
		for _, p := range packages {
			if got, err := s.Set("packages", p.ImportPath, p); err != nil || got != want {
				t.Fatalf("set %s: %v, %v; want %v", p.ImportPath, got, err, want)
			}
			if want == zestor.SetCreated {
				put("packages", p)
			}
		}
	}

	// Fifty packages are there when the watches start.
	store(packages[:50], zestor.SetCreated)
	var wantReplay docEvents
	for _, key := range slices.Sorted(maps.Keys(model["packages"])) {
		wantReplay = append(wantReplay, docEvent(zestor.EventCreate, model["packages"][key]))
	}
	wantReplay = append(wantReplay, zestor.Event[docPackage]{Type: zestor.EventSynced, Kind: "packages", Revision: 50})
	written = nil
	var watching sync.WaitGroup
	reached := make(chan bool, 2)
	collect := func(into *docEvents, opts ...zestor.WatchOption) {
		ctx, cancel := context.WithCancel(t.Context())
		t.Cleanup(cancel)
		events, err := s.Watch(ctx, "packages", opts...)
		check(t, err)
		watching.Go(func() {
			for ev := range events {
				*into = append(*into, ev)
				if ev.Key == "the end" {
					reached <- true
					cancel()
				}
			}
		})
	}
	collect(&replayed, zestor.WithInitialReplay())
	collect(&live)
	store(packages[50:], zestor.SetCreated)
	store(packages, zestor.SetUnchanged)

	// Queries.
	keys := slices.Sorted(maps.Keys(model["packages"]))
	got, err := s.Keys("packages")
	check(t, err)
	docSame(t, "keys", got, keys)
	isNet := func(key string) bool { return strings.HasPrefix(key, "net/") }
	net := slices.DeleteFunc(slices.Clone(keys), func(key string) bool { return !isNet(key) })
	docSame(t, "prefix net/", docScan(t, s, zestor.Range{Prefix: "net/"}), net)
	if len(net) == 0 || net[0] != "net/http" {
		t.Errorf("packages in net/: %q", net)
	}
	many, err := s.List("packages",
		func(key string, p docPackage) bool { return len(p.Imports) > 20 },
		func(key string, p docPackage) bool { return p.Doc != "" })
	check(t, err)
	want := map[string]docPackage{}
	for _, p := range packages {
		if len(p.Imports) > 20 && p.Doc != "" {
			want[p.ImportPath] = p
		}
	}
	docSame(t, "packages with many imports", many, want)
	if _, ok := many["net/http"]; !ok {
		t.Error("net/http has few imports")
	}
	for _, descending := range []bool{false, true} {
		var paged []string
		for page := (zestor.Range{Limit: 25, Descending: descending}); ; page.After = paged[len(paged)-1] {
			got := docScan(t, s, page)
			paged = append(paged, got...)
			if len(got) < 25 {
				break
			}
		}
		if descending {
			slices.Reverse(paged)
		}
		docSame(t, "pages of 25", paged, keys)
	}

	// Updates: SetFn, and a transaction that moves packages to another kind.
	for _, key := range net {
		changed, err := s.SetFn("packages", key, func(p docPackage) (docPackage, error) {
			p.Doc = strings.ToUpper(p.Doc)
			return p, nil
		})
		p := model["packages"][key].Value
		if upper := strings.ToUpper(p.Doc); upper != p.Doc {
			p.Doc = upper
			put("packages", p)
		} else if changed {
			t.Errorf("SetFn of %s without a change: %v, %v", key, changed, err)
		}
		check(t, err)
	}
	move := func(tx zestor.ReadWriter[docPackage]) error {
		for entry, err := range tx.Scan("packages", zestor.Range{Prefix: "vendor/"}) {
			if err != nil {
				return err
			}
			if _, _, err := tx.Delete("packages", entry.Key); err != nil {
				return err
			}
			if _, err := tx.Set("vendored", entry.Key, entry.Value); err != nil {
				return err
			}
		}
		return nil
	}
	failed := errors.New("changed my mind")
	if err := s.Update(func(tx zestor.ReadWriter[docPackage]) error {
		return errors.Join(move(tx), failed)
	}); !errors.Is(err, failed) {
		t.Errorf("a transaction that fails: %v", err)
	}
	check(t, s.Update(move))
	for _, key := range keys {
		if strings.HasPrefix(key, "vendor/") {
			p := model["packages"][key].Value
			remove(key)
			put("vendored", p)
		}
	}
	if len(model["vendored"]) == 0 {
		t.Error("no package was moved")
	}

	end := docPackage{ImportPath: "the end"}
	store([]docPackage{end}, zestor.SetCreated)
	<-reached
	<-reached
	watching.Wait()
	docSame(t, "the watch with a replay", replayed, append(wantReplay, written...))
	docSame(t, "the watch without", live, written)

	entries := docEntries(t, s)
	var wantEntries []zestor.Entry[docPackage]
	for _, kind := range []string{"packages", "vendored"} {
		for _, key := range slices.Sorted(maps.Keys(model[kind])) {
			wantEntries = append(wantEntries, model[kind][key])
		}
	}
	docSame(t, "entries", docWithoutTimes(entries), wantEntries)
	if got, err := s.Revision(); err != nil || got != revision {
		t.Errorf("revision: %d, %v; want %d", got, err, revision)
	}
	return replayed, live
}

func docEvent(what zestor.EventType, e zestor.Entry[docPackage]) zestor.Event[docPackage] {
	return zestor.Event[docPackage]{Type: what, Kind: e.Kind, Key: e.Key, Value: e.Value, Version: e.Version, Revision: e.Revision}
}

func docScan(t *testing.T, s docStore, r zestor.Range) (keys []string) {
	t.Helper()
	for entry, err := range s.Scan("packages", r) {
		check(t, err)
		keys = append(keys, entry.Key)
	}
	return keys
}

func docEntries(t *testing.T, s docStore) []zestor.Entry[docPackage] {
	t.Helper()
	packages, err := s.Values("packages")
	check(t, err)
	vendored, err := s.Values("vendored")
	check(t, err)
	return append(packages, vendored...)
}

func docWithoutTimes(entries []zestor.Entry[docPackage]) []zestor.Entry[docPackage] {
	entries = slices.Clone(entries)
	for i := range entries {
		entries[i].UpdatedAt = time.Time{}
	}
	return entries
}

// docSame compares, and prints the first difference of slices.
func docSame[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if reflect.DeepEqual(got, want) {
		return
	}
	g, w := reflect.ValueOf(got), reflect.ValueOf(want)
	if g.Kind() == reflect.Slice {
		for i := range min(g.Len(), w.Len()) {
			if !reflect.DeepEqual(g.Index(i).Interface(), w.Index(i).Interface()) {
				t.Fatalf("%s: at %d of %d is\n%+v\nwant, of %d,\n%+v", what, i, g.Len(), g.Index(i), w.Len(), w.Index(i))
			}
		}
	}
	t.Fatalf("%s: %d, want %d, or other values", what, g.Len(), w.Len())
}

// Examples: the programs of README.md.

// docStores runs the body of a loop on an empty store of each kind.
func docStores[T any]() iter.Seq2[string, zestor.Store[T]] {
	return func(yield func(string, zestor.Store[T]) bool) {
		memory := zestor.NewMemStore(zestor.StoreOptions[T]{})
		defer memory.Close()
		dir, err := os.MkdirTemp("", "zestor")
		must(err)
		defer os.RemoveAll(dir)
		file, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[T]{DSN: filepath.Join(dir, "app.db")})
		must(err)
		defer file.Close()
		_ = yield("memory", memory) && yield("sqlite", file)
	}
}

func Example() {
	type User struct{ Name, Email string }

	for name, s := range docStores[User]() { // a memory store, then a file
		fmt.Println(name)
		ctx, cancel := context.WithCancel(context.Background())
		events, err := s.Watch(ctx, "users")
		must(err)

		_, err = s.Set("users", "alice", User{Name: "Alice", Email: "alice@example.com"})
		must(err)
		_, err = s.Set("users", "bob", User{Name: "Bob"})
		must(err)
		result, err := s.Set("users", "bob", User{Name: "Bob"}) // nothing new
		must(err)
		fmt.Println("bob again:", result)
		_, _, err = s.Delete("users", "bob")
		must(err)

		alice, ok, err := s.GetEntry("users", "alice")
		must(err)
		fmt.Println(ok, alice.Value.Email, "version", alice.Version, "revision", alice.Revision)
		_, ok, err = s.Get("users", "bob")
		must(err)
		fmt.Println("bob:", ok)

		for ev := range events {
			fmt.Println(ev.Revision, ev.Type, ev.Key, ev.Value.Name)
			if ev.Type == zestor.EventDelete {
				break
			}
		}
		cancel()
	}
	// Output:
	// memory
	// bob again: unchanged
	// true alice@example.com version 1 revision 1
	// bob: false
	// 1 create alice Alice
	// 2 create bob Bob
	// 3 delete bob Bob
	// sqlite
	// bob again: unchanged
	// true alice@example.com version 1 revision 1
	// bob: false
	// 1 create alice Alice
	// 2 create bob Bob
	// 3 delete bob Bob
}

func ExampleNewSQLiteStore() {
	type User struct{ Name, Email string }
	dir, err := os.MkdirTemp("", "zestor")
	must(err)
	defer os.RemoveAll(dir)
	options := zestor.SQLiteOptions[User]{
		DSN: filepath.Join(dir, "app.db"),
		StoreOptions: zestor.StoreOptions[User]{
			ValidateFns: map[string]zestor.ValidateFunc[User]{
				"users": func(u User) error {
					if u.Email == "" {
						return errors.New("email required")
					}
					return nil
				},
			},
		},
	}

	s, err := zestor.NewSQLiteStore(options)
	must(err)
	_, err = s.Set("users", "alice", User{Name: "Alice"})
	fmt.Println(err)
	_, err = s.Set("users", "alice", User{Name: "Alice", Email: "alice@example.com"})
	must(err)
	must(s.Close())

	s, err = zestor.NewSQLiteStore(options) // a later run of the program
	must(err)
	defer s.Close()
	alice, _, err := s.Get("users", "alice")
	must(err)
	fmt.Println(alice.Email)
	// Output:
	// zestor: set users/alice: email required
	// alice@example.com
}

// docConfig is a program's own.
type docConfig struct {
	Testing      bool
	DatabasePath string
}

// docNewStore is where a program chooses its store.
func docNewStore(cfg docConfig) (zestor.Store[user], error) {
	if cfg.Testing {
		return zestor.NewMemStore[user](zestor.StoreOptions[user]{}), nil
	}
	return zestor.NewSQLiteStore[user](zestor.SQLiteOptions[user]{DSN: cfg.DatabasePath, Codec: &zestor.JSON{}})
}

// docProcessUsers works with either.
func docProcessUsers(s zestor.Store[user]) error {
	users, err := s.List("users")
	if err != nil {
		return err
	}
	for _, key := range slices.Sorted(maps.Keys(users)) {
		fmt.Println(key, "lives in", users[key].City)
	}
	return nil
}

// Swapping one store for the other.
func ExampleNewMemStore() {
	dir, err := os.MkdirTemp("", "zestor")
	must(err)
	defer os.RemoveAll(dir)
	for _, cfg := range []docConfig{{Testing: true}, {DatabasePath: filepath.Join(dir, "app.db")}} {
		s, err := docNewStore(cfg)
		must(err)
		must(s.SetMany("users", map[string]user{"bob": {City: "Bern"}, "alice": {City: "Accra"}}))
		must(docProcessUsers(s))
		must(s.Close())
	}
	// Output:
	// alice lives in Accra
	// bob lives in Bern
	// alice lives in Accra
	// bob lives in Bern
}

// A counter that starts from nothing, and two keys that change together.
func ExampleStore_update() {
	for name, s := range docStores[int]() {
		count := func(tx zestor.ReadWriter[int]) error {
			n, _, err := tx.Get("counters", "visits")
			if err != nil {
				return err
			}
			_, err = tx.Set("counters", "visits", n+1)
			return err
		}
		must(s.Update(count))
		must(s.Update(count))

		err := s.Update(func(tx zestor.ReadWriter[int]) error {
			if _, err := tx.Set("counters", "clicks", 1); err != nil {
				return err
			}
			if err := count(tx); err != nil {
				return err
			}
			return errors.New("changed my mind") // so nothing of it is stored
		})
		counters, listErr := s.List("counters")
		must(listErr)
		fmt.Println(name, err, counters)
	}
	// Output:
	// memory changed my mind map[visits:2]
	// sqlite changed my mind map[visits:2]
}

// Changing what somebody else may change too, without a lock.
func ExampleStore_setIf() {
	for name, s := range docStores[[]string]() {
		add := func(item string, meanwhile func()) error {
			for {
				list, _, err := s.GetEntry("lists", "shopping") // an absent entry has revision 0
				if err != nil {
					return err
				}
				meanwhile()
				_, err = s.SetIf("lists", "shopping", append(slices.Clone(list.Value), item), list.Revision)
				if !errors.Is(err, zestor.ErrConflict) {
					return err
				}
				fmt.Println(name, err)
			}
		}
		others := []string{"salt"}
		must(add("bread", func() {
			for _, item := range others { // somebody else is faster, once
				others = nil
				must(add(item, func() {}))
			}
		}))
		list, _, err := s.Get("lists", "shopping")
		must(err)
		fmt.Println(name, list)
	}
	// Output:
	// memory zestor: setif lists/shopping: revision conflict
	// memory [salt bread]
	// sqlite zestor: setif lists/shopping: revision conflict
	// sqlite [salt bread]
}

// docFollow keeps state equal to the users in the store until ctx ends. changed
// is called after each event.
func docFollow(ctx context.Context, s zestor.Store[user], state map[string]user, changed func(), opts ...zestor.WatchOption) error {
	since := int64(-1) // from the beginning
	for {
		from := zestor.WithSince(since)
		if since < 0 {
			from = zestor.WithInitialReplay()
		}
		events, err := s.Watch(ctx, "users", append(opts, from)...)
		switch {
		case errors.Is(err, zestor.ErrCompacted): // what was missed is not kept any more
			since = -1
			continue
		case err != nil: // ctx has ended, or the store is closed
			return err
		case since < 0:
			clear(state)
		}
		for ev := range events {
			switch {
			case ev.Type == zestor.EventSynced: // state is up to date
			case errors.Is(ev.Err, zestor.ErrWatchOverflow), errors.Is(ev.Err, zestor.ErrCompacted):
				since = ev.Revision // go on exactly there, or with -1 start over
			case ev.Type == zestor.EventError: // of the disk, say
				return ev.Err
			case ev.Type == zestor.EventDelete:
				delete(state, ev.Key)
			case ev.Err != nil: // somebody stored what is no user
				delete(state, ev.Key)
				fmt.Println(ev.Err)
			default: // create or update
				state[ev.Key] = ev.Value
			}
			changed()
		}
	}
}

// Keeping a copy up to date, whatever happens.
func ExampleStore_watch() {
	for name, s := range docStores[user]() {
		ctx, cancel := context.WithCancel(context.Background())
		state, slow := map[string]user{}, true
		err := docFollow(ctx, s, state, func() {
			if slow { // so slow that a watch with a small buffer overflows
				slow = false
				for i := range 300 {
					_, err := s.Set("users", "user"+strconv.Itoa(i%10), user{Name: "Someone", Age: i})
					must(err)
				}
			}
			if state["user9"].Age == 299 {
				cancel()
			}
		}, zestor.WithBufferSize(20))
		fmt.Println(name, len(state), state["user9"].Age, err)
	}
	// Output:
	// memory 10 299 context canceled
	// sqlite 10 299 context canceled
}

// Pages of two, from the last key.
func ExampleStore_scan() {
	for name, s := range docStores[int]() {
		must(s.SetMany("files", map[string]int{"a/1": 10, "a/2": 20, "a/3": 30, "b/1": 40}))
		page := zestor.Range{Prefix: "a/", Limit: 2, Descending: true}
		for {
			n := 0
			for entry, err := range s.Scan("files", page) {
				must(err)
				fmt.Println(name, entry.Key, entry.Value)
				page.After = entry.Key
				n++
			}
			if n < page.Limit {
				break
			}
			fmt.Println("next page")
		}
	}
	// Output:
	// memory a/3 30
	// memory a/2 20
	// next page
	// memory a/1 10
	// sqlite a/3 30
	// sqlite a/2 20
	// next page
	// sqlite a/1 10
}

// A codec of two functions.
func ExampleNewCodec() {
	type User struct{ Name, Email string }
	s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[User]{
		DSN:   ":memory:",
		Codec: zestor.NewCodec(xml.Marshal, xml.Unmarshal),
	})
	must(err)
	defer s.Close()
	_, err = s.Set("users", "alice", User{Name: "Alice"})
	must(err)
	alice, _, err := s.Get("users", "alice")
	must(err)
	fmt.Println(alice.Name)
	// Output: Alice
}

// What changed since last time: a tool that a shell calls now and then.
func ExampleWithSince() {
	dir, err := os.MkdirTemp("", "zestor")
	must(err)
	defer os.RemoveAll(dir)
	database, seen := filepath.Join(dir, "app.db"), filepath.Join(dir, "app.seen")

	tool := func() {
		s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[json.RawMessage]{DSN: database})
		must(err)
		defer s.Close()
		text, _ := os.ReadFile(seen)
		since, _ := strconv.ParseInt(string(text), 10, 64) // the first time: 0
		events, err := s.Watch(context.Background(), "users", zestor.WithSince(since))
		if errors.Is(err, zestor.ErrCompacted) { // too long ago: all there is
			events, err = s.Watch(context.Background(), "users", zestor.WithInitialReplay())
		}
		must(err)
		for ev := range events {
			if ev.Type == zestor.EventSynced {
				must(os.WriteFile(seen, strconv.AppendInt(nil, ev.Revision, 10), 0o644))
				return
			}
			fmt.Println(ev.Type, ev.Key, string(ev.Value), ev.Err)
		}
	}

	s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[map[string]int]{DSN: database})
	must(err)
	defer s.Close()
	must(s.SetMany("users", map[string]map[string]int{"alice": {"age": 30}, "bob": {"age": 40}}))
	tool()
	_, err = s.Set("users", "alice", map[string]int{"age": 31})
	must(err)
	_, _, err = s.Delete("users", "bob")
	must(err)
	fmt.Println("again")
	tool()
	fmt.Println("and again")
	tool()
	// Output:
	// create alice {"age":30} <nil>
	// create bob {"age":40} <nil>
	// again
	// update alice {"age":31} <nil>
	// delete bob {"age":40} <nil>
	// and again
}

// Benchmarks, each beside its floor: what an expert would write by hand for
// the same work on the same 10,000 keys. Their ratio is the figure.

const benchN = 10_000

// benchKey is the key of the i-th of n entries, in an order that is not theirs.
func benchKey(i, n int) string { return fmt.Sprintf("user-%08d", i*7919%n) }

// benchUser is about 100 bytes of JSON. Another round is another value.
func benchUser(i, round int) user {
	return user{"Ada Lovelace the " + strconv.Itoa(i) + "th", "ada" + strconv.Itoa(i) + "@example.com", "London, Westminster", round}
}

// benchData is what every benchmark works on.
func benchData(n int) (keys []string, values []user) {
	for i := range n {
		keys = append(keys, benchKey(i, n))
		values = append(values, benchUser(i, 0))
	}
	return keys, values
}

// benchFill stores data in steps that are no bigger than a program's.
func benchFill(tb testing.TB, s zestor.Store[user], keys []string, values []user) {
	tb.Helper()
	some := make(map[string]user)
	for i, key := range keys {
		if some[key] = values[i]; len(some) == benchN || i == len(keys)-1 {
			check(tb, s.SetMany("users", some))
			clear(some)
		}
	}
}

func benchMem(b *testing.B) (s zestor.Store[user], keys []string, values []user) {
	keys, values = benchData(benchN)
	s = open(b, "memory", zestor.StoreOptions[user]{})
	benchFill(b, s, keys, values)
	return s, keys, values
}

// benchMap is the floor of the memory store.
type benchMap struct {
	mu    sync.RWMutex
	kinds map[string]map[string]user
}

func newBenchMap(keys []string, values []user) *benchMap {
	m := &benchMap{kinds: map[string]map[string]user{"users": {}}}
	for i, key := range keys {
		m.set("users", key, values[i])
	}
	return m
}

func (m *benchMap) get(kind, key string) (user, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	v, ok := m.kinds[kind][key]
	return v, ok
}

func (m *benchMap) set(kind, key string, v user) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.kinds[kind][key] = v
}

func (m *benchMap) setNew(kind, key string, v user) (changed bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.kinds[kind][key] == v {
		return false
	}
	m.kinds[kind][key] = v
	return true
}

func (m *benchMap) list(kind string) map[string]user {
	m.mu.RLock()
	defer m.mu.RUnlock()
	list := make(map[string]user, len(m.kinds[kind]))
	for key, v := range m.kinds[kind] {
		list[key] = v
	}
	return list
}

// benchSub is a sub-benchmark that calls f in its loop, after start.
func benchSub(b *testing.B, name string, start func(b *testing.B) func(i int)) {
	b.Run(name, func(b *testing.B) {
		f := start(b)
		b.ReportAllocs()
		runtime.GC()
		for i := 0; b.Loop(); i++ {
			f(i)
		}
	})
}

func BenchmarkMemGet(b *testing.B) {
	benchSub(b, "zestor", func(b *testing.B) func(int) {
		s, keys, _ := benchMem(b)
		return func(i int) {
			if _, ok, err := s.Get("users", keys[i%benchN]); !ok || err != nil {
				b.Fatal(ok, err)
			}
		}
	})
	benchSub(b, "floor", func(b *testing.B) func(int) {
		keys, values := benchData(benchN)
		m := newBenchMap(keys, values)
		return func(i int) {
			if _, ok := m.get("users", keys[i%benchN]); !ok {
				b.Fatal("absent")
			}
		}
	})
}

func BenchmarkMemGetParallel(b *testing.B) {
	parallel := func(b *testing.B, keys []string, get func(kind, key string) bool) {
		b.ReportAllocs()
		b.ResetTimer()
		b.RunParallel(func(pb *testing.PB) {
			for i := rand.IntN(benchN); pb.Next(); i++ {
				if !get("users", keys[i%benchN]) {
					b.Error("absent")
				}
			}
		})
	}
	b.Run("zestor", func(b *testing.B) {
		s, keys, _ := benchMem(b)
		parallel(b, keys, func(kind, key string) bool { _, ok, err := s.Get(kind, key); return ok && err == nil })
	})
	b.Run("floor", func(b *testing.B) {
		keys, values := benchData(benchN)
		m := newBenchMap(keys, values)
		parallel(b, keys, func(kind, key string) bool { _, ok := m.get(kind, key); return ok })
	})
}

func BenchmarkMemSetUpdate(b *testing.B) {
	benchSub(b, "zestor", func(b *testing.B) func(int) {
		s, keys, values := benchMem(b)
		return func(i int) {
			v := values[i%benchN]
			v.Age = i + 1
			if r, err := s.Set("users", keys[i%benchN], v); r != zestor.SetUpdated {
				b.Fatal(r, err)
			}
		}
	})
	benchSub(b, "floor", func(b *testing.B) func(int) {
		keys, values := benchData(benchN)
		m := newBenchMap(keys, values)
		return func(i int) {
			v := values[i%benchN]
			v.Age = i + 1
			m.set("users", keys[i%benchN], v)
		}
	})
}

func BenchmarkMemSetNoop(b *testing.B) {
	benchSub(b, "zestor", func(b *testing.B) func(int) {
		s, keys, values := benchMem(b)
		return func(i int) {
			if r, err := s.Set("users", keys[i%benchN], values[i%benchN]); r != zestor.SetUnchanged || err != nil {
				b.Fatal(r, err)
			}
		}
	})
	benchSub(b, "floor", func(b *testing.B) func(int) {
		keys, values := benchData(benchN)
		m := newBenchMap(keys, values)
		return func(i int) {
			if m.setNew("users", keys[i%benchN], values[i%benchN]) {
				b.Fatal("changed")
			}
		}
	})
}

func BenchmarkMemList(b *testing.B) {
	benchSub(b, "zestor", func(b *testing.B) func(int) {
		s, _, _ := benchMem(b)
		return func(int) { benchList(b, s) }
	})
	benchSub(b, "floor", func(b *testing.B) func(int) {
		m := newBenchMap(benchData(benchN))
		return func(int) {
			if len(m.list("users")) != benchN {
				b.Fatal("incomplete")
			}
		}
	})
}

func benchList(b *testing.B, s zestor.Store[user]) {
	if list, err := s.List("users"); err != nil || len(list) != benchN {
		b.Fatal(len(list), err)
	}
}

// BenchmarkMemWatchers measures a Set until each of 100 watchers that drain
// their channels has its event.
func BenchmarkMemWatchers(b *testing.B) {
	const watchers = 100
	run := func(name string, start func(b *testing.B, received *sync.WaitGroup) (set func(i int), end func())) {
		b.Run(fmt.Sprintf("%s-%d", name, watchers), func(b *testing.B) {
			var received sync.WaitGroup
			set, end := start(b, &received)
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				set(i)
			}
			end()
			received.Wait()
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*watchers), "ns/event")
		})
	}
	drain := func(b *testing.B, received *sync.WaitGroup, ch <-chan zestor.Event[user]) {
		n := b.N
		received.Go(func() {
			for range n {
				if ev := <-ch; ev.Type != zestor.EventUpdate {
					b.Errorf("%v", ev)
					return
				}
			}
		})
	}
	run("zestor", func(b *testing.B, received *sync.WaitGroup) (func(int), func()) {
		s, keys, values := benchMem(b)
		ctx, cancel := context.WithCancel(context.Background())
		b.Cleanup(cancel)
		for range watchers {
			ch, err := s.Watch(ctx, "users", zestor.WithBufferSize(1<<30))
			check(b, err)
			drain(b, received, ch)
		}
		return func(i int) {
			v := values[i%benchN]
			v.Age = i + 1
			if _, err := s.Set("users", keys[i%benchN], v); err != nil {
				b.Fatal(err)
			}
		}, func() {}
	})
	run("floor", func(b *testing.B, received *sync.WaitGroup) (func(int), func()) {
		keys, values := benchData(benchN)
		var channels []chan zestor.Event[user]
		for range watchers {
			ch := make(chan zestor.Event[user], 64)
			channels = append(channels, ch)
			drain(b, received, ch)
		}
		return func(i int) {
			v := values[i%benchN]
			v.Age = i + 1
			ev := zestor.Event[user]{Type: zestor.EventUpdate, Kind: "users", Key: keys[i%benchN], Value: v, Version: 1, Revision: int64(i)}
			for _, ch := range channels {
				ch <- ev
			}
		}, func() {}
	})
}

// benchSQLite is a store of n entries in a file.
func benchSQLite(b *testing.B, n int, synchronous string, historyBytes int64) (s zestor.Store[user], keys []string, values []user) {
	keys, values = benchData(n)
	dsn := "file:" + filepath.Join(b.TempDir(), "zestor.db") + "?_synchronous=" + synchronous
	s = openSQLite(b, zestor.SQLiteOptions[user]{DSN: dsn, HistoryBytes: historyBytes})
	benchFill(b, s, keys, values)
	return s, keys, values
}

// benchDB is the floor of the SQLite store: database/sql, WAL, and the table
// of the multi-package Zestor, which has no log.
type benchDB struct {
	*sql.DB
	dsn string
	get *sql.Stmt
	set *sql.Stmt
}

const (
	benchSelect = `SELECT value FROM kv WHERE kind = ? AND key = ?`
	benchUpsert = `INSERT INTO kv (kind, key, value) VALUES (?, ?, ?) ON CONFLICT (kind, key) DO UPDATE
		SET value = excluded.value, version = version + 1, updated_at = excluded.updated_at`
)

func benchDSN(path, synchronous string) string {
	return "file:" + path + "?_journal_mode=WAL&_busy_timeout=5000&_synchronous=" + synchronous
}

func newBenchDB(b *testing.B, synchronous string) (db *benchDB, keys []string, values []user) {
	keys, values = benchData(benchN)
	db = &benchDB{dsn: benchDSN(filepath.Join(b.TempDir(), "floor.db"), synchronous)}
	var err error
	db.DB, err = sql.Open("sqlite3", db.dsn)
	check(b, err)
	b.Cleanup(func() { check(b, db.Close()) })
	_, err = db.Exec(`CREATE TABLE kv (kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, version INTEGER NOT NULL DEFAULT 1,
		updated_at TEXT NOT NULL DEFAULT (STRFTIME('%Y-%m-%dT%H:%M:%fZ','now')), PRIMARY KEY (kind, key))`)
	check(b, err)
	db.get, err = db.Prepare(benchSelect)
	check(b, err)
	db.set, err = db.Prepare(benchUpsert)
	check(b, err)
	db.setMany(b, keys, values)
	return db, keys, values
}

func (db *benchDB) setMany(b *testing.B, keys []string, values []user) {
	tx, err := db.Begin()
	check(b, err)
	set := tx.Stmt(db.set)
	for i, key := range keys {
		benchUpsertInto(b, set, key, values[i])
	}
	check(b, tx.Commit())
}

func benchUpsertInto(b *testing.B, set *sql.Stmt, key string, v user) {
	data, err := json.Marshal(v)
	check(b, err)
	check(b, rwErr(set.Exec("users", key, data)))
}

func BenchmarkSQLiteGet(b *testing.B) {
	benchSub(b, "zestor", func(b *testing.B) func(int) {
		s, keys, _ := benchSQLite(b, benchN, "FULL", 0)
		return func(i int) {
			if _, ok, err := s.Get("users", keys[i%benchN]); !ok || err != nil {
				b.Fatal(ok, err)
			}
		}
	})
	benchSub(b, "floor", func(b *testing.B) func(int) {
		db, keys, _ := newBenchDB(b, "FULL")
		return func(i int) {
			var data []byte
			var v user
			check(b, db.get.QueryRow("users", keys[i%benchN]).Scan(&data))
			check(b, json.Unmarshal(data, &v))
		}
	})
}

func benchSQLiteSet(b *testing.B, synchronous string) {
	set := func(historyBytes int64) func(b *testing.B) func(int) {
		return func(b *testing.B) func(int) {
			s, keys, values := benchSQLite(b, benchN, synchronous, historyBytes)
			return func(i int) {
				v := values[i%benchN]
				v.Age = i + 1
				if r, err := s.Set("users", keys[i%benchN], v); r != zestor.SetUpdated {
					b.Fatal(r, err)
				}
			}
		}
	}
	benchSub(b, "zestor", set(0))
	benchSub(b, "zestor-full-history", set(1<<20)) // each Set makes it longer, so that it is cut all the time
	benchSub(b, "floor", func(b *testing.B) func(int) {
		db, keys, values := newBenchDB(b, synchronous)
		return func(i int) {
			v := values[i%benchN]
			v.Age = i + 1
			benchUpsertInto(b, db.set, keys[i%benchN], v)
		}
	})
}

func BenchmarkSQLiteSetDurable(b *testing.B) { benchSQLiteSet(b, "FULL") }
func BenchmarkSQLiteSetNormal(b *testing.B)  { benchSQLiteSet(b, "NORMAL") }

func BenchmarkSQLiteSetNoop(b *testing.B) {
	benchSub(b, "zestor", func(b *testing.B) func(int) {
		s, keys, values := benchSQLite(b, benchN, "FULL", 0)
		return func(i int) {
			if r, err := s.Set("users", keys[i%benchN], values[i%benchN]); r != zestor.SetUnchanged || err != nil {
				b.Fatal(r, err)
			}
		}
	})
	benchSub(b, "floor", func(b *testing.B) func(int) {
		db, keys, values := newBenchDB(b, "FULL")
		return func(i int) {
			var old []byte
			data, err := json.Marshal(values[i%benchN])
			check(b, err)
			check(b, db.get.QueryRow("users", keys[i%benchN]).Scan(&old))
			if string(old) != string(data) {
				b.Fatal("changed")
			}
		}
	})
}

func BenchmarkSQLiteSetMany(b *testing.B) {
	setMany := func(historyBytes int64) func(b *testing.B) func(int) {
		return func(b *testing.B) func(int) {
			s, keys, values := benchSQLite(b, benchN, "FULL", historyBytes)
			var rounds [2]map[string]user
			for r := range rounds {
				rounds[r] = make(map[string]user)
				for i, key := range keys {
					values[i].Age = r + 1
					rounds[r][key] = values[i]
				}
			}
			return func(i int) { check(b, s.SetMany("users", rounds[i%2])) }
		}
	}
	benchSub(b, "zestor", setMany(0))
	benchSub(b, "zestor-full-history", setMany(1<<20)) // which the default is from the ninth on
	benchSub(b, "floor", func(b *testing.B) func(int) {
		db, keys, values := newBenchDB(b, "FULL")
		sorted := make([]string, benchN)
		var rounds [2][]user
		for r := range rounds {
			rounds[r] = make([]user, benchN)
			for i := range keys {
				at := i * 7919 % benchN
				values[i].Age = r + 1
				sorted[at], rounds[r][at] = keys[i], values[i]
			}
		}
		return func(i int) { db.setMany(b, sorted, rounds[i%2]) }
	})
}

func BenchmarkSQLiteList(b *testing.B) {
	benchSub(b, "zestor", func(b *testing.B) func(int) {
		s, _, _ := benchSQLite(b, benchN, "FULL", 0)
		return func(int) { benchList(b, s) }
	})
	benchSub(b, "floor", func(b *testing.B) func(int) {
		db, _, _ := newBenchDB(b, "FULL")
		list, err := db.Prepare(`SELECT key, value FROM kv WHERE kind = ?`)
		check(b, err)
		return func(int) {
			all := make(map[string]user)
			benchRows(b, list, func(key string, v user) { all[key] = v })
			if len(all) != benchN {
				b.Fatal(len(all))
			}
		}
	})
}

func BenchmarkSQLiteScan(b *testing.B) {
	benchSub(b, "zestor", func(b *testing.B) func(int) {
		s, _, _ := benchSQLite(b, benchN, "FULL", 0)
		return func(int) {
			n := 0
			for _, err := range s.Scan("users", zestor.Range{}) {
				check(b, err)
				n++
			}
			if n != benchN {
				b.Fatal(n)
			}
		}
	})
	benchSub(b, "floor", func(b *testing.B) func(int) {
		db, _, _ := newBenchDB(b, "FULL")
		scan, err := db.Prepare(`SELECT key, value FROM kv WHERE kind = ? ORDER BY key`)
		check(b, err)
		return func(int) {
			n := 0
			benchRows(b, scan, func(string, user) { n++ })
			if n != benchN {
				b.Fatal(n)
			}
		}
	})
}

func benchRows(b *testing.B, query *sql.Stmt, use func(key string, v user)) {
	rows, err := query.Query("users")
	check(b, err)
	defer rows.Close()
	for rows.Next() {
		var key string
		var data sql.RawBytes
		var v user
		check(b, rows.Scan(&key, &data))
		check(b, json.Unmarshal(data, &v))
		use(key, v)
	}
	check(b, rows.Err())
}

// BenchmarkSQLiteGroupCommit is the time per durable Set when many goroutines
// set at once; its floor writes one after the other.
func BenchmarkSQLiteGroupCommit(b *testing.B) {
	for _, writers := range []int{8, 64} {
		b.Run(fmt.Sprintf("zestor-%d", writers), func(b *testing.B) {
			s, keys, values := benchSQLite(b, benchN, "FULL", 0)
			var next atomic.Int64
			var group sync.WaitGroup
			b.ReportAllocs()
			b.ResetTimer()
			for range writers {
				group.Go(func() {
					for i := int(next.Add(1)); i <= b.N; i = int(next.Add(1)) {
						v := values[i%benchN]
						v.Age = i
						if r, err := s.Set("users", keys[i%benchN], v); r != zestor.SetUpdated {
							b.Error(r, err)
						}
					}
				})
			}
			group.Wait()
		})
	}
	benchSub(b, "floor", func(b *testing.B) func(int) {
		db, keys, values := newBenchDB(b, "FULL")
		return func(i int) {
			v := values[i%benchN]
			v.Age = i + 1
			benchUpsertInto(b, db.set, keys[i%benchN], v)
		}
	})
}

// BenchmarkSQLiteOpen is a command-line tool: it opens the file, reads one key
// and exits. The floor's file has neither log nor triggers. SQLite parses those for
// whoever opens a file: the other floor opens the store's own by hand.
func BenchmarkSQLiteOpen(b *testing.B) {
	keys, values := benchData(benchN)
	newFile := func(b *testing.B) (path string) {
		path = filepath.Join(b.TempDir(), "zestor.db")
		s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[user]{DSN: path})
		check(b, err)
		benchFill(b, s, keys, values)
		check(b, s.Close())
		return path
	}
	byHand := func(b *testing.B, dsn, query string) func(int) {
		return func(i int) {
			var data []byte
			var v user
			db, err := sql.Open("sqlite3", dsn)
			check(b, err)
			check(b, db.QueryRow(query, "users", keys[i%benchN]).Scan(&data))
			check(b, json.Unmarshal(data, &v))
			check(b, db.Close())
		}
	}
	benchSub(b, "zestor", func(b *testing.B) func(int) {
		path := newFile(b)
		return func(i int) {
			s, err := zestor.NewSQLiteStore(zestor.SQLiteOptions[user]{DSN: path})
			check(b, err)
			if _, ok, err := s.Get("users", keys[i%benchN]); !ok || err != nil {
				b.Fatal(ok, err)
			}
			check(b, s.Close())
		}
	})
	benchSub(b, "floor", func(b *testing.B) func(int) {
		made, _, _ := newBenchDB(b, "FULL")
		check(b, made.Close())
		return byHand(b, made.dsn, benchSelect)
	})
	benchSub(b, "floor-same-file", func(b *testing.B) func(int) {
		return byHand(b, benchDSN(newFile(b), "FULL"), strings.Replace(benchSelect, " kv ", " zestor_kv ", 1))
	})
}

// BenchmarkGrowth shows that the cost of an operation does not grow with the
// store, but for the depth of a tree and the misses of a cache.
func BenchmarkGrowth(b *testing.B) {
	sizes := []int{1_000, 100_000}
	if long {
		sizes = append(sizes, 1_000_000)
	}
	for _, kind := range []string{"memory", "sqlite"} {
		for _, n := range sizes {
			b.Run(fmt.Sprintf("%s-%d", kind, n), func(b *testing.B) {
				keys, values := benchData(n)
				s := open(b, kind, zestor.StoreOptions[user]{})
				benchFill(b, s, keys, values)
				round := 0
				benchSub(b, "get", func(b *testing.B) func(int) {
					return func(i int) {
						if _, ok, err := s.Get("users", keys[i%n]); !ok || err != nil {
							b.Fatal(ok, err)
						}
					}
				})
				benchSub(b, "set", func(b *testing.B) func(int) {
					return func(i int) {
						v := values[i%n]
						round++
						v.Age = round
						if r, err := s.Set("users", keys[i%n], v); r != zestor.SetUpdated {
							b.Fatal(r, err)
						}
					}
				})
				benchSub(b, "scan-100", func(b *testing.B) func(int) {
					return func(i int) {
						rows := 0
						for _, err := range s.Scan("users", zestor.Range{Prefix: keys[i%n][:len("user-000000")]}) {
							check(b, err)
							rows++
						}
						if rows != 100 {
							b.Fatal(rows)
						}
					}
				})
			})
		}
	}
}

// benchHeap is what is allocated and still in use.
func benchHeap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A watch takes little memory for changes that it does not want, however large.
func TestMemoryOfWatch(t *testing.T) {
	raw := zestor.NewCodec(func(v any) ([]byte, error) { return v.([]byte), nil }, json.Unmarshal)
	o := zestor.SQLiteOptions[[]byte]{DSN: "file:" + filepath.Join(t.TempDir(), "a.db") + "?_sync=OFF", HistoryBytes: 1 << 30, Codec: raw}
	s, other := openSQLite(t, o), openSQLite(t, o)
	events := watchOn(t, s, "small")
	large := make([]byte, 4<<20)
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() {
		check(t, other.Update(func(tx zestor.ReadWriter[[]byte]) error {
			for i := range 25 {
				if _, err := tx.Set("large", fmt.Sprint(i), large); err != nil {
					return err
				}
			}
			return rwErr(tx.Set("small", "a", nil))
		}))
	})
	most := int64(0)
	for seen := false; !seen; most = max(most, benchHeap()) {
		select {
		case <-events:
			seen = true
		default:
		}
	}
	if most > 64<<20 {
		t.Errorf("the heap came to %d MiB", most>>20)
	}
}

func TestMemoryOfMemStore(t *testing.T) {
	n := fileMore(50_000, 1_000_000)
	keys, values := benchData(n)
	before := benchHeap()
	plain := map[string]map[string]user{"users": {}}
	for i, key := range keys {
		plain["users"][key] = values[i]
	}
	floor := benchHeap() - before
	runtime.KeepAlive(plain)
	plain = nil

	before = benchHeap()
	s := open(t, "memory", zestor.StoreOptions[user]{})
	benchFill(t, s, keys, values)
	used := benchHeap() - before
	for range s.Scan("users", zestor.Range{Limit: 1}) { // makes the index of keys
	}
	indexed := benchHeap() - before
	t.Logf("%d keys: a map of maps %d KiB; the store %.2f times as much, with its index %.2f times",
		n, floor>>10, float64(used)/float64(floor), float64(indexed)/float64(floor))
	if indexed > floor*3/2 {
		t.Errorf("%d bytes for %d keys, where a map of maps takes %d", indexed, n, floor)
	}
	runtime.KeepAlive(keys)
	runtime.KeepAlive(values)
}

// Of keys and kinds that came and went nothing is left.
func TestMemoryOfChurn(t *testing.T) {
	s := open(t, "memory", zestor.StoreOptions[int]{})
	churn := func(n int) {
		for i := range n {
			kind := fmt.Sprint("kind", i)
			check(t, rwErr(s.Set(kind, "a", i)))
			check(t, rwErr(s.Set("k", kind, i)))
			for _, at := range [][2]string{{kind, "a"}, {"k", kind}} {
				check(t, rwErr(s.Delete(at[0], at[1])))
			}
		}
	}
	check(t, rwErr(s.Set("k", "a", 0)))
	churn(100)
	before := benchHeap()
	churn(50_000)
	if grown := benchHeap() - before; grown > 1<<20 {
		t.Errorf("%d bytes more after 50,000 kinds and keys that are gone", grown)
	}
	fileOK(t)(s.Count("k"))
}

// The memory store allocates nothing for what programs do most: it builds no event
// while nobody watches, and compares without reflection.
func TestMemStoreAllocatesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, "memory", zestor.StoreOptions[user]{})
		ctx, cancel := context.WithCancel(t.Context())
		check(t, rwErr(s.Watch(ctx, "users")))
		n, values := 0, [2]user{benchUser(1, 0), benchUser(1, 1)}
		s.Set("users", "a", values[0])
		cancel()
		synctest.Wait() // nobody watches any more
		for name, f := range map[string]func(){
			"Get":                   func() { s.Get("users", "a") },
			"Get of an absent key":  func() { s.Get("users", "b") },
			"Get of an absent kind": func() { s.Get("others", "a") },
			"Set of an equal value": func() { s.Set("users", "a", values[n%2]) },
			"Set of another value":  func() { n++; s.Set("users", "a", values[n%2]) },
		} {
			if allocs := testing.AllocsPerRun(1000, f); allocs != 0 {
				t.Errorf("%s: %v allocations", name, allocs)
			}
		}
	})
}

func TestScanInConstantMemory(t *testing.T) {
	n := fileMore(50_000, 1_000_000)
	s := open(t, "sqlite", zestor.StoreOptions[user]{})
	some := make(map[string]user)
	for i := range n {
		if some[benchKey(i, n)] = benchUser(i, 0); len(some) == benchN {
			check(t, s.SetMany("users", some))
			clear(some)
		}
	}
	for name, scan := range map[string]func(func(e zestor.Entry[user])){
		"Scan": func(use func(e zestor.Entry[user])) {
			for e, err := range s.Scan("users", zestor.Range{}) {
				check(t, err)
				use(e)
			}
		},
		"View": func(use func(e zestor.Entry[user])) {
			check(t, s.View(func(tx zestor.Reader[user]) error {
				for e, err := range tx.Scan("users", zestor.Range{Descending: true}) {
					check(t, err)
					use(e)
				}
				return nil
			}))
		},
	} {
		t.Run(name, func(t *testing.T) {
			before, most, rows := benchHeap(), int64(0), 0
			scan(func(zestor.Entry[user]) {
				if rows++; rows%(n/10) == n/20 {
					most = max(most, benchHeap()-before)
				}
			})
			t.Logf("%d rows: %d KiB", rows, most>>10)
			if rows != n || most > 1<<20 {
				t.Errorf("%d of %d rows, %d bytes of memory while scanning", rows, n, most)
			}
		})
	}
}

// Only a log that has become long makes a writer wait for readers, however many
// rows it writes.
func TestWALShortWaitsForNobody(t *testing.T) {
	s := openSQLite(t, zestor.SQLiteOptions[int]{DSN: filepath.Join(t.TempDir(), "a.db")})
	values, round := make(map[string]int), 0
	write := func() time.Duration {
		start := time.Now()
		for range 8 {
			round++
			for i := range 3000 {
				values[fmt.Sprint(i)] = round
			}
			check(t, s.SetMany("k", values))
		}
		return time.Since(start)
	}
	write()
	alone, beside := write(), time.Duration(0)
	rwView(t, s, func(tx zestor.Reader[int]) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			beside = write()
		}()
		<-done
	})
	if beside > 8*alone { // waiting would make it some 40 times
		t.Fatalf("the same writes took %v alone, and %v beside a View", alone, beside)
	}
}

// walSize is how long the WAL of a file is.
func walSize(t testing.TB, path string) int64 {
	info, err := os.Stat(path + "-wal")
	check(t, err)
	return info.Size()
}

// walViews has one View after the other until ctx ends. Several of these overlap.
func walViews[T any](ctx context.Context, t testing.TB, s zestor.Store[T], last time.Duration) {
	for ctx.Err() == nil {
		rwView(t, s, func(tx zestor.Reader[T]) {
			rwErr(tx.Revision())
			time.Sleep(last)
		})
		time.Sleep(time.Millisecond)
	}
}

// Stores that are open for a moment only see to the WAL too.
func TestWALOfShortStores(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	o := zestor.SQLiteOptions[int]{DSN: "file:" + path + "?_synchronous=NORMAL"}
	s := openSQLite(t, o)
	ctx, stop := context.WithCancel(t.Context())
	var group sync.WaitGroup
	for range 2 {
		group.Go(func() { walViews(ctx, t, s, 50*time.Millisecond) })
	}
	most := int64(0)
	for range 20 {
		w := openSQLite(t, o)
		for i := range 500 {
			fileOK(t)(w.Set("k", fmt.Sprint(i), int(most)+i))
		}
		check(t, w.Close())
		most = max(most, walSize(t, path))
	}
	stop()
	group.Wait()
	if most > 16<<20 {
		t.Errorf("the WAL grew to %d bytes", most)
	}
}

// Several stores that write, each beside overlapping Views, keep the WAL small
// together, although each writes while another waits for the readers.
func TestWALOfSeveralWriters(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	ctx, stop := context.WithTimeout(t.Context(), 5*time.Second)
	defer stop()
	var group sync.WaitGroup
	var writes atomic.Int64
	for n := range 3 {
		s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: "file:" + path + "?_synchronous=OFF"})
		group.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				value := fmt.Sprint(i, strings.Repeat("x", 20_000))
				if _, err := s.Set("k", fmt.Sprint(n, i%100), value); err != nil {
					t.Error(err)
				}
				if writes.Add(1) > 3000 { // which would take the WAL to twice the limit
					stop()
				}
			}
		})
		for late := range 2 {
			group.Go(func() {
				time.Sleep(time.Duration(late) * 50 * time.Millisecond) // so that they overlap
				walViews(ctx, t, s, 100*time.Millisecond)
			})
		}
	}
	most := int64(0)
	for ctx.Err() == nil {
		if info, err := os.Stat(path + "-wal"); err == nil {
			most = max(most, info.Size())
		}
		time.Sleep(time.Millisecond)
	}
	group.Wait()
	t.Logf("%d writes: the WAL reached %d KiB", writes.Load(), most>>10)
	if most > 32<<20 {
		t.Errorf("the WAL grew to %d bytes", most)
	}
}

// However the writes of one store are shaped, however long its reads last up to a
// second, and however short its BusyTimeout is, the WAL stays small; also if
// another store writes now and then, which never waits for longer than that.
func TestWALOfOneWriter(t *testing.T) {
	for _, c := range []struct {
		name    string
		page    int
		readers int
		view    time.Duration
		rows    int           // a transaction
		size    int           // of a row
		split   bool          // each second key is absent: it deletes and creates, on pages that were full
		many    bool          // by SetMany
		other   time.Duration // another store writes each time that this is over
		busy    time.Duration // the BusyTimeout of both
		last    time.Duration // or less, if it is enough that
		writes  int           // which would take a WAL that nobody restarts much further than the limit
	}{
		{"reads of a second", 4096, 25, 900 * time.Millisecond, 1, 20_000, false, false, time.Hour, time.Second, 7 * time.Second, 1000},
		{"another store", 4096, 4, 800 * time.Millisecond, 1, 20_000, false, false, 3 * time.Second, time.Second, 10 * time.Second, 1000},
		{"another store, often", 4096, 2, 300 * time.Millisecond, 1, 20_000, false, false, 20 * time.Millisecond, 5 * time.Second, 10 * time.Second, 1000},
		{"rows with overflow pages", 4096, 2, 50 * time.Millisecond, 10, 1010, false, false, time.Hour, math.MaxInt64, 10 * time.Second, 5000},
		{"pages that split", 4096, 3, 50 * time.Millisecond, 10, 930, true, false, time.Hour, math.MaxInt64, 10 * time.Second, 12_000},
		{"large rows", 4096, 2, 50 * time.Millisecond, 40, 20_000, false, true, time.Hour, math.MaxInt64, 10 * time.Second, 1500},
		{"large pages", 16384, 2, 50 * time.Millisecond, 1, 200, false, false, time.Hour, math.MaxInt64, 10 * time.Second, 1500},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			path, link := filepath.Join(t.TempDir(), "a.db"), filepath.Join(t.TempDir(), "link.db")
			check(t, os.Symlink(path, link)) // the WAL is beside the file
			fileSQL(t, path, fmt.Sprint("PRAGMA page_size = ", c.page), "PRAGMA journal_mode = WAL")
			o := zestor.SQLiteOptions[string]{DSN: "file:" + link + "?_synchronous=OFF"}
			s := openSQLite(t, o)
			key := func(i int) string { return fmt.Sprint(i * 7919 % 20_000) } // rarely two on a page
			values := make(map[string]string)
			for i := range 20_000 {
				if !c.split || i%2 == 0 {
					values[key(i)] = strings.Repeat("y", min(c.size, 1010))
				}
			}
			check(t, s.SetMany("k", values))
			check(t, s.Close()) // which takes the WAL into the file
			o.BusyTimeout = c.busy
			s = openSQLite(t, o)
			other := openSQLite(t, o)

			ctx, stop := context.WithTimeout(t.Context(), c.last)
			defer stop()
			var group sync.WaitGroup
			for n := range c.readers {
				group.Go(func() {
					time.Sleep(c.view * time.Duration(n) / time.Duration(c.readers)) // so that they overlap
					walViews(ctx, t, s, c.view)
				})
			}
			group.Go(func() {
				for i := 0; ctx.Err() == nil; i++ {
					fileOK(t)(other.Set("other", "a", fmt.Sprint(i)))
					select {
					case <-ctx.Done():
					case <-time.After(c.other):
					}
				}
			})
			most, writes := int64(0), 0
			for ctx.Err() == nil && writes < c.writes {
				check(t, s.Update(func(tx zestor.ReadWriter[string]) (err error) {
					batch := make(map[string]string)
					for range c.rows {
						writes++
						existed, value := false, fmt.Sprint(writes, strings.Repeat("x", c.size))
						if c.split {
							existed, _, err = tx.Delete("k", key(writes))
						}
						switch {
						case err != nil || existed:
						case c.many:
							batch[key(writes)] = value
						default:
							_, err = tx.Set("k", key(writes), value)
						}
						if err != nil {
							return err
						}
					}
					return tx.SetMany("k", batch)
				}))
				most = max(most, walSize(t, path))
			}
			stop()
			group.Wait()
			t.Logf("%d writes: the WAL reached %d KiB", writes, most>>10)
			if most > 16<<20 {
				t.Errorf("the WAL grew to %d bytes", most)
			}
		})
	}
}

// While a store waits for the readers of a long WAL, which may be for longer than
// its BusyTimeout, whoever else waits for no longer than that can write.
func TestWALRestartLetsOthersWrite(t *testing.T) {
	t.Parallel() // it waits, most of the time
	path := filepath.Join(t.TempDir(), "a.db")
	s := openSQLite(t, zestor.SQLiteOptions[string]{DSN: "file:" + path + "?_synchronous=OFF", BusyTimeout: 100 * time.Millisecond})
	fileOK(t)(s.Set("k", "a", ""))
	other, err := sql.Open("sqlite3", "file:"+path+"?_busy_timeout=100&_synchronous=OFF")
	check(t, err)
	defer other.Close()
	isLong := func() bool { return walSize(t, path) >= 12<<20 }
	written, refused := 0, 0
	rwView(t, s, func(tx zestor.Reader[string]) {
		waited := make(chan struct{})
		go func() {
			defer close(waited)
			for i, start := 0, time.Now(); time.Since(start) < time.Second || !isLong(); i++ {
				start = time.Now()
				_, err := s.Set("k", "a", fmt.Sprint(i, strings.Repeat("x", 20_000)))
				if err != nil && !strings.Contains(err.Error(), "BusyTimeout") {
					t.Error(err)
				}
			}
		}()
		for {
			select {
			case <-waited:
				return
			default:
			}
			if !isLong() {
				continue
			}
			written++
			if _, err := other.Exec(`UPDATE zestor_kv SET value = '"' || random() || '"'`); err != nil {
				written--
				refused++
			}
		}
	})
	t.Logf("%d writes, %d refused", written, refused)
	if written == 0 || refused > 11 { // each has waited for 0.1 s, of some 3.3
		t.Error("too few were let in")
	}
}

// A store that was opened without WAL, before another switched the file to it, keeps it small too.
func TestWALSwitchedElsewhere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	o := zestor.SQLiteOptions[string]{DSN: "file:" + path + "?_sync=OFF", DisableWAL: true}
	s := openSQLite(t, o)
	fileOK(t)(s.Set("k", "a", ""))
	o.DisableWAL = false
	other := openSQLite(t, o)
	fileEqual(t, "mode", fileQuery(t, path, "PRAGMA journal_mode"), "wal")
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	var group sync.WaitGroup
	for range 2 {
		group.Go(func() { walViews(ctx, t, other, 50*time.Millisecond) })
	}
	most := int64(0)
	for i := 0; ctx.Err() == nil && i < 1000; i++ {
		fileOK(t)(s.Set("k", "a", fmt.Sprint(i, strings.Repeat("x", 20_000))))
		most = max(most, walSize(t, path))
	}
	stop()
	group.Wait()
	if most > 16<<20 {
		t.Errorf("the WAL grew to %d bytes", most)
	}
}
