package proxy

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// oracle is an identity.Source that says of one workload what the test wants, also to
// those who watch already.
type oracle struct {
	mu      sync.Mutex
	says    identity.Update
	changed chan struct{}
	watched int
}

func (o *oracle) say(u identity.Update) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.says = u
	if o.changed != nil {
		close(o.changed)
	}
	o.changed = make(chan struct{})
}

func (o *oracle) Watch(ctx context.Context, _ *identity.Workload) <-chan identity.Update {
	out := make(chan identity.Update)
	o.mu.Lock()
	o.watched++
	o.mu.Unlock()
	go func() {
		defer close(out)
		for {
			o.mu.Lock()
			u, changed := o.says, o.changed
			o.mu.Unlock()
			select {
			case out <- u:
			case <-ctx.Done():
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// A workload that the manager lets go of while a connection of its comes about is asked about
// again when that registers: what has been said of it since was said to nobody.
func TestDroppedWhileAConnectionComesAbout(t *testing.T) {
	withdrawn := identity.Update{Err: fmt.Errorf("%w: its entry was deleted", identity.ErrWithdrawn)}
	for name, tc := range map[string]struct {
		// says is what the source says by the time it is asked again; nil: as before.
		says func(ca *authority) identity.Update
		// asked: somebody else asks about it before the connection registers.
		asked bool
		want  symbolonv1.Reason
		role  string // that the party has afterwards
	}{
		"still so":                        {nil, false, 0, "web"},
		"still so, asked":                 {nil, true, 0, "web"},
		"withdrawn":                       {func(*authority) identity.Update { return withdrawn }, false, symbolonv1.Reason_REASON_NO_IDENTITY, "web"},
		"withdrawn, asked":                {func(*authority) identity.Update { return withdrawn }, true, symbolonv1.Reason_REASON_NO_IDENTITY, "web"},
		"ended, which takes nothing back": {func(*authority) identity.Update { return identity.Update{Err: identity.ErrEnded} }, false, 0, "web"},
		"other claims": {func(ca *authority) identity.Update {
			return identity.Update{Credential: ca.workload("/prod/web", map[string][]string{"role": {"other"}})}
		}, false, 0, "other"},
		"other claims, asked": {func(ca *authority) identity.Update {
			return identity.Update{Credential: ca.workload("/prod/web", map[string][]string{"role": {"other"}})}
		}, true, 0, "other"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := newAuthority(t, "acme.example")
				source := &oracle{}
				source.say(identity.Update{Credential: ca.workload("/prod/web", map[string][]string{"role": {"web"}})})
				m := identity.NewManager(source)
				defer m.Close()
				p := New(Options{Records: newRecorder(t), Log: zap.NewNop(), Credentials: m, Timeouts: Timeouts{Setup: 10 * time.Second}})
				m.Subscribe(p.CredentialChanged)
				m.SubscribeDropped(p.WorkloadDropped)
				w := &identity.Workload{Key: identity.Key{UID: 7}}
				cred, err := m.Get(t.Context(), w)
				if err != nil {
					t.Fatal(err)
				}
				me := p.parties.get(w, cred, time.Now())

				time.Sleep(40 * time.Minute) // nobody asks: it is dropped
				if n := len(m.Snapshot()); n != 0 {
					t.Fatalf("%d workloads are in use", n)
				}
				if tc.says != nil {
					source.say(tc.says(ca))
				}
				if tc.asked {
					_, _ = m.Get(t.Context(), w)
				}
				l := &live{question: question{kind: toAddress, near: me}, judge: func(*policydb.Compiled, time.Time) (bool, time.Time) { return true, time.Time{} }, cut: func() {}}
				held := p.hold(me)
				p.table.add(l, time.Now())
				p.conns.Wait()
				if got := l.cutReason(); got != tc.want {
					t.Errorf("cut: %s, want %s", got, tc.want)
				}
				if got := me.principal().Attributes.Get("role"); got != tc.role {
					t.Errorf("it is judged with role=%s, want %s", got, tc.role)
				}
				if tc.want == 0 && name != "ended, which takes nothing back" {
					// From here on it hears of what happens.
					if got := m.Snapshot(); len(got) != 1 || got[0].Pins != 1 {
						t.Errorf("in use: %+v", got)
					}
					source.say(withdrawn)
					synctest.Wait()
					if got := l.cutReason(); got != symbolonv1.Reason_REASON_NO_IDENTITY {
						t.Errorf("withdrawn later: %s", got)
					}
				}
				p.table.remove(l)
				held.release(time.Now())
			})
		})
	}
}
