package policydb

import (
	"testing"
	"time"

	"github.com/symbolon/symbolon/identity"
)

func TestMayReach(t *testing.T) {
	w := compile(t, tree+`
kind: Policy
namespace: /acme/prod
name: web-db
subject: {app: web}
verb: allow
object: {app: db}
ports: [tcp/5432]
---
kind: Policy
namespace: /acme/prod
name: batch-by-night
subject: {app: batch}
verb: allow
object: any
when: {hours: "00:00-06:00", timezone: UTC}
---
kind: Policy
namespace: /acme
name: not-propagated
subject: any
verb: allow
object: any
---
kind: Policy
namespace: /acme/prod
name: watched
subject: {app: watched}
verb: allow
object: any
mode: observe
---
kind: Policy
namespace: /acme/prod
name: denied
subject: {app: denied}
verb: deny
object: any
`)
	at := func(hour int) time.Time { return time.Date(2026, 7, 15, hour, 0, 0, 0, time.UTC) }
	for _, c := range []struct {
		name, namespace, app string
		now                  time.Time
		want                 bool
	}{
		{"somebody", "/acme/prod", "web", noon, true},
		{"nobody's policy", "/acme/prod", "stranger", noon, false},
		{"in its window", "/acme/prod", "batch", at(3), true},
		{"outside its window", "/acme/prod", "batch", at(7), false},
		{"observed only", "/acme/prod", "watched", noon, false},
		{"denied only", "/acme/prod", "denied", noon, false},
		{"a parent's that does not propagate", "/acme", "stranger", noon, true},
		{"no such namespace", "/nowhere", "web", noon, false},
	} {
		own := &Endpoint{Namespace: c.namespace, Attributes: identity.NewAttributes(map[string][]string{"app": {c.app}})}
		if got := w.compiled.MayReach(own, c.now); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
