package identity

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// keptBy runs a source until its workload has an SVID, and returns what is kept.
func keptBy(t *testing.T, c *testController) []byte {
	t.Helper()
	m, _ := managerOf(t, c)
	mustGet(t, m, webWorkload)
	b, err := MarshalKept(m.Keep())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func restored(t *testing.T, b []byte) []Kept {
	t.Helper()
	kept, err := UnmarshalKept(b, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return kept
}

// While the controller is away, a workload begins with the SVID of the run before;
// when it is back, it gets a new one.
func TestRestoredSVIDBridgesAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		b := keptBy(t, c)
		before := restored(t, b)
		c.set(func() { c.fail = errors.New("away") })
		m, s := managerOf(t, c)
		s.Restore(before)
		if d := cmp.Diff(1, len(s.Restored())); d != "" {
			t.Error(d)
		}
		cred := mustGet(t, m, webWorkload)
		if !cred.SVID.Chain[0].Equal(before[0].SVID.Chain[0]) || cred.SVID.Key == nil {
			t.Errorf("%v, want the one of before", cred)
		}
		if kept := m.Keep(); len(kept) != 1 || len(s.Restored()) != 0 {
			t.Errorf("%d in use and %d waiting, want 1 and 0", len(kept), len(s.Restored()))
		}
		c.set(func() { c.fail = nil })
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if now := mustGet(t, m, webWorkload); now.SVID.Chain[0].Equal(cred.SVID.Chain[0]) {
			t.Error("the controller was back, and there is no new SVID")
		}
	})
}

// A restored SVID is for the very same workload, for as long as it is valid, and only
// if the trust bundle of now vouches for it.
func TestRestoredSVIDIsNotForOthers(t *testing.T) {
	for name, change := range map[string]func(c *testController, s *ControllerSource, w *Workload){
		"another key":        func(_ *testController, _ *ControllerSource, w *Workload) { w.Key.CgroupID++ },
		"another executable": func(_ *testController, _ *ControllerSource, w *Workload) { w.Key.Exe.Ctime++ },
		"other attributes":   func(_ *testController, _ *ControllerSource, w *Workload) { w.Attributes = w.Attributes[:1] },
		"expired":            func(c *testController, _ *ControllerSource, _ *Workload) { time.Sleep(c.ttl + time.Second) },
		"another root": func(c *testController, s *ControllerSource, _ *Workload) {
			s.SetBundle(acme, []*x509.Certificate{newRoot(c.t, "acme.example").cert})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newController(t)
				kept := restored(t, keptBy(t, c))
				c.set(func() { c.fail = errors.New("away") })
				m, s := managerOf(t, c)
				s.Restore(kept)
				w := *webWorkload
				change(c, s, &w)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if cred, err := m.Get(ctx, &w); !errors.Is(err, ErrNoCredential) {
					t.Errorf("%v, %v", cred, err)
				}
			})
		})
	}
}

func TestUnmarshalKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		b := keptBy(t, c)
		other := keptBy(t, newController(t))
		change := func(f func(mine, other *keptJSON)) []byte {
			var x, y []keptJSON
			if err := errors.Join(json.Unmarshal(b, &x), json.Unmarshal(other, &y)); err != nil {
				t.Fatal(err)
			}
			f(&x[0], &y[0])
			out, err := json.Marshal(x)
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
		for name, bad := range map[string][]byte{
			"nothing":              nil,
			"no JSON":              []byte("{"),
			"no chain":             change(func(x, _ *keptJSON) { x.Chain = nil }),
			"no certificate":       change(func(x, _ *keptJSON) { x.Chain[0] = []byte("x") }),
			"too long a chain":     change(func(x, _ *keptJSON) { x.Chain = make([][]byte, 100) }),
			"no key":               change(func(x, _ *keptJSON) { x.Private = nil }),
			"another's key":        change(func(x, y *keptJSON) { x.Private = y.Private }),
			"a CA for a workload":  change(func(x, _ *keptJSON) { x.Chain = x.Chain[1:] }),
			"far too many of them": []byte("[" + strings.Repeat("{},", maxKept) + "{}]"),
		} {
			if kept, err := UnmarshalKept(bad, time.Now()); err == nil {
				t.Errorf("%s: %d kept", name, len(kept))
			}
		}
		if kept, err := UnmarshalKept(b, time.Now().Add(c.ttl)); err != nil || len(kept) != 0 {
			t.Errorf("expired: %d, %v", len(kept), err)
		}
	})
}
