package policydb

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const profiles = tree + `
kind: Namespace
name: /acme/prod/db
mode: enforce
---
kind: Namespace
name: /acme/shop
mode: enforce
---
kind: Profile
namespace: /
name: prod-hosts
match: {host.env: prod}
labels: {env: prod}
---
kind: Profile
namespace: /acme
name: postgres
match: {proc.exe: {prefix: /usr/lib/postgresql/}, os.user: postgres}
workload: postgres
labels: {app: postgres, tier: db}
---
kind: Profile
namespace: /acme
name: b-postgres
match: {proc.exe: {prefix: /usr/lib/postgresql/}}
workload: postgres-b
labels: {tier: store}
claims: [proc.exe, host.*]
---
kind: Profile
namespace: /acme/prod/db
name: payments
match: {proc.exe: {prefix: /usr/lib/postgresql/}, host.role: payments}
workload: payments-db
labels: {app: payments}
claims: [os.user]
---
kind: Profile
namespace: /acme/shop
name: postgres
match: {os.user: postgres}
workload: shop-db
labels: {app: shop}
`

func TestAssign(t *testing.T) {
	db := newDB(t, profiles)
	const pg = "proc.exe=/usr/lib/postgresql/15/bin/postgres,os.user=postgres,os.group=postgres,proc.unit=postgresql@15-main.service,host.env=prod,host.id=h1"
	for _, c := range []struct {
		name, host, attributes string
		want                   Assignment
	}{
		{"a profile above names the workload in the host's namespace", "/acme/prod", pg, Assignment{
			Namespace: "/acme/prod", Workload: "postgres-b", // of two at one depth the first by name
			Labels:   attributes("app=postgres,env=prod,tier=db,tier=store"), // the union of all that match
			Profiles: []string{"/acme/b-postgres", "/acme/postgres", "/prod-hosts"},
			Claims: attributes("app=postgres,env=prod,tier=db,tier=store,host.env=prod,host.id=h1," +
				"proc.exe=/usr/lib/postgresql/15/bin/postgres"), // as the profiles say, not as by default
		}},
		{"the deepest namespace wins, and a profile below the host's gives its own", "/acme/prod", pg + ",host.role=payments", Assignment{
			Namespace: "/acme/prod/db", Workload: "payments-db",
			Labels:   attributes("app=payments,app=postgres,env=prod,tier=db,tier=store"),
			Profiles: []string{"/acme/b-postgres", "/acme/postgres", "/acme/prod/db/payments", "/prod-hosts"},
			Claims: attributes("app=payments,app=postgres,env=prod,tier=db,tier=store,host.env=prod,host.id=h1,host.role=payments," +
				"os.user=postgres,proc.exe=/usr/lib/postgresql/15/bin/postgres"),
		}},
		{"of two branches below the host's one names, and the other gives nothing", "/acme", pg + ",host.role=payments", Assignment{
			Namespace: "/acme/prod/db", Workload: "payments-db",
			Labels:   attributes("app=payments,app=postgres,env=prod,tier=db,tier=store"),
			Profiles: []string{"/acme/b-postgres", "/acme/postgres", "/acme/prod/db/payments", "/prod-hosts"},
			Claims: attributes("app=payments,app=postgres,env=prod,tier=db,tier=store,host.env=prod,host.id=h1,host.role=payments," +
				"os.user=postgres,proc.exe=/usr/lib/postgresql/15/bin/postgres"),
		}},
		{"another branch has no say", "/acme/prod", "proc.exe=/bin/x,os.user=postgres", Assignment{
			Namespace: "/acme/prod", Workload: "unprofiled.x", Claims: attributes("os.user=postgres"),
		}},
		{"what matches nothing has labels of label profiles only", "/acme/prod", "proc.exe=/opt/my app/run it!,host.env=prod,os.user=u,os.kernel=6,proc.uid=7,k8s.pod=p,cloud.zone=a,image.name=i", Assignment{
			Namespace: "/acme/prod", Workload: "unprofiled.run-it-", Labels: attributes("env=prod"), Profiles: []string{"/prod-hosts"},
			Claims: attributes("env=prod,host.env=prod,os.user=u,k8s.pod=p,cloud.zone=a,image.name=i"), // the default set
		}},
		{"a unit names better than a program", "/", "proc.exe=/bin/sh,proc.unit=getty@tty1.service", Assignment{
			Namespace: "/", Workload: "unprofiled.getty-tty1.service",
		}},
		{"nothing is known", "/nowhere", "", Assignment{Namespace: "/nowhere", Workload: "unprofiled.unknown"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, db.Snapshot().Assign(c.host, attributes(c.attributes))); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// TestAssignTakesNoLabelFromTheHost: a process cannot name itself, nor a host it.
func TestAssignTakesNoLabelFromTheHost(t *testing.T) {
	db := newDB(t, profiles+`---
kind: Profile
namespace: /acme/prod
name: all-claims
match: {os.user: mallory}
labels: {tier: low}
claims: [host.*, os.*]
`)
	a := db.Snapshot().Assign("/acme/prod", attributes("os.user=mallory,app=payments,env=prod,spiffe.id=spiffe://acme/x,host.id=h1"))
	if diff := cmp.Diff(attributes("tier=low,os.user=mallory,host.id=h1"), a.Claims); diff != "" {
		t.Errorf("claims: -want +got:\n%s", diff)
	}
	if diff := cmp.Diff(attributes("tier=low"), a.Labels); diff != "" {
		t.Errorf("labels: -want +got:\n%s", diff)
	}
}

func TestUnprofiledNamesAreOneSegment(t *testing.T) {
	for _, exe := range []string{"/", "/a/..", "/ü/é", "/x/" + strings.Repeat("long", 100), "..", "a/b c\n"} {
		name := unprofiledName(attributes("proc.exe=" + exe))
		if !isSegment(name) || len(name) > maxNameBytes || !strings.HasPrefix(name, UnprofiledPrefix) {
			t.Errorf("%q gives %q", exe, name)
		}
	}
}

// A pattern takes everything along but what a process says of itself.
func TestPatternsLeaveOutTheProcessesOwnWord(t *testing.T) {
	for _, tt := range []struct {
		claims []string
		key    string
		want   bool
	}{
		{[]string{"proc.*"}, "proc.exe", true},
		{[]string{"proc.*"}, "proc.args", false},
		{[]string{"*"}, "proc.args", false},
		{[]string{"proc.a*"}, "proc.args", false},
		{[]string{"proc.args"}, "proc.args", true},
		{[]string{"proc.*", "proc.args"}, "proc.args", true},
		{defaultClaims, "proc.args", false},
	} {
		if got := claimed(tt.claims, tt.key); got != tt.want {
			t.Errorf("%v takes %s: %v", tt.claims, tt.key, got)
		}
	}
}
