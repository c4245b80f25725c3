package main

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/proxy"
	"github.com/symbolon/symbolon/redirect"
)

// How clients are found is the operator's choice, and never silently another.
func TestOwnersAsConfigured(t *testing.T) {
	k := &kernel{}
	if err := k.openConnects(redirect.DefaultConfig(), proxy.OwnerSockDiag); err != nil || k.connects != nil {
		t.Errorf("sock_diag: %v, %v", k.connects, err)
	}
	if got := k.owners(); !strings.HasPrefix(got, "sock_diag: ") {
		t.Errorf("sock_diag: %q", got)
	}
	if os.Geteuid() != 0 {
		t.Skip("the rest needs root")
	}
	for _, owner := range []string{proxy.OwnerAuto, proxy.OwnerEBPF} {
		k := &kernel{}
		err := k.openConnects(redirect.DefaultConfig(), owner)
		t.Cleanup(k.close)
		switch {
		case err != nil && (owner == proxy.OwnerAuto || !errors.Is(err, redirect.ErrNoConnects)):
			t.Errorf("%s: %v", owner, err)
		case err == nil && (k.connects == nil) != strings.HasPrefix(k.owners(), "sock_diag: "):
			t.Errorf("%s: records %v, but %q", owner, k.connects != nil, k.owners())
		}
	}
}
