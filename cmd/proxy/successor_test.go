package main

import (
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/internal/handover"
)

// What one process leaves opens in the next one of the same proxy, and in no other.
func TestEstate(t *testing.T) {
	j := newJoined(t)
	j.generation.Store(&symbolonv1.Generation{Number: 7})
	leave := func() *handover.Snapshot {
		t.Helper()
		s, err := j.snapshot()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	next := func() *host { return &host{cfg: j.cfg, log: zap.NewNop()} }
	t.Run("the same proxy", func(t *testing.T) {
		e, err := next().check(leave())
		if err != nil {
			t.Fatal(err)
		}
		if e.policy.GetNumber() != 7 || len(e.workloads) != 1 || e.host.HostID != j.host.cred.Load().HostID {
			t.Errorf("generation %d, %d workloads, host %s", e.policy.GetNumber(), len(e.workloads), e.host.HostID)
		}
		if got := e.workloads[0].SVID; got.ID != j.svid.ID || got.Key == nil {
			t.Errorf("%v", got)
		}
	})
	for name, tc := range map[string]struct {
		change func(*host, *handover.Snapshot)
		want   string
	}{
		"another controller":   {func(h *host, _ *handover.Snapshot) { h.cfg.Controller.Address = "198.51.100.5:7443" }, "not this proxy's"},
		"another proxy":        {func(_ *host, s *handover.Snapshot) { s.Instance += "2" }, "not this proxy's"},
		"another host":         {func(_ *host, s *handover.Snapshot) { s.HostID = "other" }, "not this proxy's"},
		"another trust domain": {func(_ *host, s *handover.Snapshot) { s.TrustDomain = "other.example" }, "not this proxy's"},
		"malformed policy":     {func(_ *host, s *handover.Snapshot) { s.Policy = []byte{0xff} }, "policy"},
		"malformed workloads":  {func(_ *host, s *handover.Snapshot) { s.Workloads = []byte("{") }, "kept SVIDs"},
	} {
		t.Run(name, func(t *testing.T) {
			h, s := next(), leave()
			tc.change(h, s)
			if e, err := h.check(s); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, %v; want %q", e, err, tc.want)
			}
		})
	}
	if err := forget(j.cfg.Socket); err != nil {
		t.Fatal(err)
	}
	t.Run("forgotten", func(t *testing.T) {
		s := leave()
		if !s.InKeyring {
			t.Fatal("the host's identity was not in the keyring")
		}
		if e, err := next().check(s); err == nil || !strings.Contains(err.Error(), "removed from the keyring") {
			t.Errorf("%v, %v", e, err)
		}
	})
	t.Run("no keyring here", func(t *testing.T) { // as in many containers
		s := leave()
		s.InKeyring = false
		if e, err := next().check(s); err != nil || e.host.HostID != s.HostID {
			t.Errorf("%v, %v", e, err)
		}
		s = leave()
		s.InKeyring, s.Host = false, []byte("{}")
		if e, err := next().check(s); err == nil {
			t.Errorf("a host without a credential: %+v", e)
		}
	})
}

// An SVID that has expired since is not taken over.
func TestExpiredEstate(t *testing.T) {
	j := newJoined(t)
	s, err := j.snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if kept, err := identity.UnmarshalKept(s.Workloads, j.svid.NotAfter().Add(time.Second)); err != nil || len(kept) != 0 {
		t.Errorf("%d, %v", len(kept), err)
	}
}
