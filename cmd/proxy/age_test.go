package main

import (
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/symbolon/symbolon/identity"
)

func TestSVIDAges(t *testing.T) {
	noon := time.Date(2026, 11, 3, 12, 0, 0, 0, time.UTC)
	svid := func(from, to int) *identity.Credential {
		return &identity.Credential{SVID: &identity.SVID{Chain: []*x509.Certificate{{
			NotBefore: noon.Add(time.Duration(from) * time.Hour), NotAfter: noon.Add(time.Duration(to) * time.Hour),
		}}}}
	}
	away := errors.New("the controller is away")
	for _, tt := range []struct {
		in   []identity.Status
		want map[string]any
	}{
		{nil, map[string]any{"count": 0, "not_replaced": 0}},
		{[]identity.Status{{Err: away}}, map[string]any{"count": 0, "not_replaced": 1}},
		{[]identity.Status{{Credential: svid(0, 24)}, {Credential: svid(-3, 21), Err: away}, {Credential: svid(-1, 20)}},
			map[string]any{"count": 3, "not_replaced": 1, "oldest_since": noon.Add(-3 * time.Hour), "next_end": noon.Add(20 * time.Hour)}},
	} {
		if diff := cmp.Diff(tt.want, svidAges(tt.in)); diff != "" {
			t.Error(diff)
		}
	}
}
