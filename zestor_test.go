package zestor_test

import ("testing";"fmt";"context";"path/filepath";"time"
. "github.com/zestor-dev/zestor")

func TestSmoke(t *testing.T) {
	s, err := NewSQLiteStore[int](SQLiteOptions[int]{DSN: filepath.Join(t.TempDir(), "a b#%.db")})
	if err != nil { t.Fatal(err) }
	m := NewMemStore[int](StoreOptions[int]{})
	p, err := NewSQLiteStore[int](SQLiteOptions[int]{DSN: ":memory:"})
	if err != nil { t.Fatal(err) }
	j, err := NewSQLiteStore[int](SQLiteOptions[int]{DSN: filepath.Join(t.TempDir(), "j.db"),DisableWAL:true})
	if err != nil { t.Fatal(err) }
	for _, s := range []Store[int]{s, m, p, j} {
		ctx, cancel := context.WithCancel(context.Background())
		s.Set("k","z",0)
		ch, err := s.Watch(ctx, "k", WithInitialReplay())
		fmt.Println(err)
		fmt.Println(s.Set("k","a",1)); fmt.Println(s.Set("k","a",1)); fmt.Println(s.Set("k","a",2))
		fmt.Println(s.GetEntry("k","a"))
		fmt.Println(s.SetMany("k", map[string]int{"b":1,"c":2}))
		fmt.Println(s.Delete("k","a"))
		fmt.Println(s.SetIf("k","a",1,3))
		fmt.Println(s.Update(func(tx ReadWriter[int]) error { tx.Set("k","q",1); n,_:=tx.Keys("k"); fmt.Println(n); return nil}))
		for e, err := range s.Scan("k", Range{Descending:true, After:"q"}) { fmt.Println(e, err); s.Set("k","r",9) }
		fmt.Println(s.Revision())
		fmt.Println(s.GetAll())
		time.Sleep(50*time.Millisecond)
		cancel()
		for e := range ch { fmt.Println(e) }
		fmt.Println(s.Close())
		fmt.Println(s.Get("",""))
	}
}
