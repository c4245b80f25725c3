package cli

import (
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func values(vs ...string) *symbolonv1.LabelValues { return &symbolonv1.LabelValues{Values: vs} }

// populate gives the controller something of every kind to show.
func populate(s *adminServer) {
	s.status = &symbolonv1.GetStatusResponse{
		Version: "0.1.0", TrustDomain: "acme.example", Generation: 12, Started: at(-3 * time.Hour),
		CaNotAfter: at(300 * 24 * time.Hour), Hosts: 3, HostsConnected: 2, Workloads: 4, Policies: 5, Namespaces: 3, FlowsLost: 7,
		Revocations: 2, Ages: &symbolonv1.Ages{
			Policy: at(-5 * time.Hour), SvidOldest: at(-10 * time.Minute), SvidNextEnd: at(20 * time.Minute),
			SvidNextEndId: "spiffe://acme.example/acme/prod/web", HostSvidNextEnd: at(time.Hour), HostSvidNextEndId: "h2",
			AwaySince: at(-2 * time.Hour), AwayId: "h3", HostsBehind: 1, Revoked: at(-26 * time.Hour),
			Scans: 4, ScanOldest: at(-50 * time.Hour), ScanNextEnd: at(9 * time.Hour),
		},
	}
	s.hosts = &symbolonv1.ListHostsResponse{Generation: 12, Hosts: []*symbolonv1.Host{
		{
			Id: "h3", Hostname: "web-2", Namespace: "/acme/prod", LastSeen: at(-2 * time.Hour), Generation: 9,
			Enrolled: at(-72 * time.Hour), SvidNotAfter: at(22 * time.Hour), Version: "0.1.0",
		},
		{
			Id: "h1", Hostname: "db-1", Namespace: "/acme/prod", Connected: true, LastSeen: at(-3 * time.Second),
			Generation: 12, Enrolled: at(-72 * time.Hour), SvidNotAfter: at(23 * time.Hour), Version: "0.1.0",
			Addresses:  []string{"10.0.0.9", "fd00::9"},
			Attributes: map[string]*symbolonv1.LabelValues{"host.role": values("db"), "os.distribution": values("debian")},
		},
		{
			Id: "h2", Hostname: "\x1b[2Jweb-1", Namespace: "/acme/dev", Connected: true, LastSeen: at(0), Generation: 11,
			Error: "policy /acme/dev/x: unknown operator\x1b]0;owned\x07", SvidNotAfter: at(time.Hour),
		},
	}}
	s.work = &symbolonv1.ListWorkloadsResponse{Workloads: []*symbolonv1.Workload{
		{
			SpiffeId: "spiffe://acme.example/acme/prod/web", Namespace: "/acme/prod", Name: "web", HostId: "h3",
			Attributes: map[string]*symbolonv1.LabelValues{"app": values("web"), "env": values("prod"), "os.user": values("www-data")},
			Issued:     at(-time.Minute), NotAfter: at(24 * time.Hour),
		},
		{
			SpiffeId: "spiffe://acme.example/acme/prod/payments-db", Namespace: "/acme/prod", Name: "payments-db", HostId: "h1",
			Attributes: map[string]*symbolonv1.LabelValues{"app": values("db"), "tier": values("a", "b")},
			Issued:     at(-time.Hour), NotAfter: at(23 * time.Hour),
		},
	}}
	s.list = &symbolonv1.ListResourcesResponse{
		Generation: 12,
		Yaml:       "kind: Namespace\nname: /acme\n---\nkind: Policy\nname: web-may-call-api\n---\nkind: Profile\nname: web\n---\nkind: External\nname: office\n",
		Resources: []*symbolonv1.Resource{
			{Namespace: "/acme", Kind: &symbolonv1.Resource_NamespaceKind{NamespaceKind: &symbolonv1.Namespace{
				Mode: symbolonv1.Mode_MODE_ENFORCE, Default: symbolonv1.Default_DEFAULT_DENY,
				Attributes: map[string]*symbolonv1.AttributeRule{"app": {}, "env": {Values: []string{"dev", "prod"}}},
			}}},
			{Namespace: "/acme/prod", Name: "web-may-call-api", Kind: &symbolonv1.Resource_Policy{Policy: &symbolonv1.Policy{
				Verb:    symbolonv1.Verb_VERB_ALLOW,
				Subject: &symbolonv1.Selector{Any: true},
				Object: &symbolonv1.Selector{Terms: []*symbolonv1.Term{
					{Clauses: []*symbolonv1.Clause{
						{Key: "app", Operator: &symbolonv1.Clause_In{In: &symbolonv1.Values{Values: []string{"api", "web"}}}},
						{Key: "vuln", Operator: &symbolonv1.Clause_Not{Not: &symbolonv1.Values{Values: []string{"critical"}}}},
					}},
					{Clauses: []*symbolonv1.Clause{
						{Key: "proc.exe", Operator: &symbolonv1.Clause_Prefix{Prefix: "/opt/"}},
						{Key: "tier", Operator: &symbolonv1.Clause_Exists{Exists: true}},
						{Key: "zone", Operator: &symbolonv1.Clause_Exists{}},
					}},
				}},
				WhereSame: []string{"env"}, WhereDifferent: []string{"cloud.zone"},
				Ports:       []*symbolonv1.PortRange{{Protocol: "tcp", First: 443, Last: 443}, {Protocol: "tcp", First: 8000, Last: 8100}},
				WithEncrypt: true, WithLog: true, When: &symbolonv1.Window{Days: 31}, Expires: at(1000 * time.Hour),
				Mode: symbolonv1.Mode_MODE_OBSERVE, Fallback: true, Propagate: true,
			}}},
			{Namespace: "/acme/prod", Name: "web", Kind: &symbolonv1.Resource_Profile{Profile: &symbolonv1.Profile{
				Match: &symbolonv1.Term{Clauses: []*symbolonv1.Clause{
					{Key: "proc.exe", Operator: &symbolonv1.Clause_In{In: &symbolonv1.Values{Values: []string{"/usr/sbin/nginx"}}}},
				}},
				Workload: "web", Labels: map[string]*symbolonv1.LabelValues{"app": values("web")},
			}}},
			{Namespace: "/acme", Name: "office", Kind: &symbolonv1.Resource_External{External: &symbolonv1.External{
				Labels:    map[string]*symbolonv1.LabelValues{"ext": values("office")},
				Addresses: &symbolonv1.Addresses{Cidrs: []string{"203.0.113.0/24"}},
			}}},
		},
	}
	s.flows = flowsOfTheTest()
	s.history = &symbolonv1.ListGenerationsResponse{Generation: 12, Generations: []*symbolonv1.PolicyGeneration{
		{Generation: 12, Time: at(-time.Hour), Actor: "admin token from 10.0.0.2", RollbackOf: 10, Message: "11 cut\nthe backups", Created: 1, Deleted: 2},
		{Generation: 11, Time: at(-50 * time.Hour), Actor: "admin token from 10.0.0.2", Updated: 3},
	}}
	s.past = &symbolonv1.GetGenerationResponse{
		Generation: s.history.Generations[0], Changes: changes.GetChanges()[:2], Yaml: "kind: Namespace\nname: /\n",
	}
	s.back = &symbolonv1.RollbackResponse{Generation: 13, Changes: changes.GetChanges()[:2]}
}

func flowsOfTheTest() []*symbolonv1.WatchFlowsResponse {
	web := &symbolonv1.FlowEndpoint{SpiffeId: "spiffe://acme.example/acme/prod/web", Address: "10.0.0.5:41234"}
	allowed := &symbolonv1.FlowRecord{
		FlowId: "000102030405060708090a0b0c0d0e0f", Reporter: symbolonv1.Reporter_REPORTER_CLIENT, Host: "h3",
		Start: at(-time.Minute), End: at(-50 * time.Second), Source: web,
		Destination: &symbolonv1.FlowEndpoint{SpiffeId: "spiffe://acme.example/acme/prod/payments-db", Address: "[fd00::9]:5432"},
		Outcome:     symbolonv1.Outcome_OUTCOME_ALLOW, Reason: symbolonv1.Reason_REASON_POLICY,
		ClientPolicy: "/acme/prod/web-db", ServerPolicy: "/acme/prod/web-db",
		Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED, TlsVersion: "TLS 1.3",
		CipherSuite: "TLS_AES_256_GCM_SHA384", KeyExchange: "X25519MLKEM768", Resumed: true,
		BytesSent: 512, BytesReceived: 3 << 20,
	}
	return []*symbolonv1.WatchFlowsResponse{
		{Record: allowed},
		{Lost: 3, Record: &symbolonv1.FlowRecord{
			FlowId: "f2", Reporter: symbolonv1.Reporter_REPORTER_CLIENT, Host: "h3", Start: at(-30 * time.Second), Source: web,
			Destination: &symbolonv1.FlowEndpoint{Address: "203.0.113.9:443", External: "/acme/office"},
			Outcome:     symbolonv1.Outcome_OUTCOME_ALLOW, Reason: symbolonv1.Reason_REASON_DEFAULT, WouldVerdict: "deny", WouldPolicy: "/acme/trial",
		}},
		{Record: &symbolonv1.FlowRecord{
			FlowId: "f3", Reporter: symbolonv1.Reporter_REPORTER_SERVER, Host: "h1", Start: at(-10 * time.Second),
			Source:      &symbolonv1.FlowEndpoint{Address: "192.0.2.7:1025"},
			Destination: &symbolonv1.FlowEndpoint{SpiffeId: "spiffe://acme.example/acme/prod/payments-db", Address: "10.0.0.9:5432"},
			Outcome:     symbolonv1.Outcome_OUTCOME_DENY, Reason: symbolonv1.Reason_REASON_PEER_REFUSED,
			PeerReason: symbolonv1.Reason_REASON_POLICY, ClientPolicy: "/acme/a", ServerPolicy: "/acme/b", Detail: "no tunnel\x1b[31m",
		}},
		{Record: &symbolonv1.FlowRecord{
			FlowId: "f4", Reporter: symbolonv1.Reporter_REPORTER_LOCAL, Host: "h1", Start: at(-time.Second), Source: web, Local: true,
			Destination: &symbolonv1.FlowEndpoint{Address: "10.0.0.9:80"},
			Outcome:     symbolonv1.Outcome_OUTCOME_ERROR, Reason: symbolonv1.Reason_REASON_TIMED_OUT, ServerPolicy: "/acme/b",
		}},
	}
}

func explanation(allow bool) *symbolonv1.ExplainResponse {
	r := &symbolonv1.ExplainResponse{
		Allow: allow, Generation: 12, Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED,
		Sides: []*symbolonv1.ExplainSide{
			{
				Side: "client", Allow: true, Reason: symbolonv1.Reason_REASON_POLICY, Policy: "/acme/prod/web-db",
				Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED, Log: true,
				Chain: []string{"/acme/prod: default inherit", "/acme: default deny", "/: default deny"},
				Candidates: []*symbolonv1.Candidate{
					{Policy: "/acme/prod/web-db", Matches: true, Verb: symbolonv1.Verb_VERB_ALLOW, Mode: symbolonv1.Mode_MODE_ENFORCE},
					{Policy: "/acme/no-dev", Failed: `subject: env is "prod", not dev`, Verb: symbolonv1.Verb_VERB_DENY, Mode: symbolonv1.Mode_MODE_OBSERVE},
				},
			},
			{Side: "server", Allow: allow, Reason: symbolonv1.Reason_REASON_DEFAULT, Chain: []string{"/: default deny"}},
		},
	}
	if !allow {
		r.Protection = 0
	}
	return r
}

func TestFormats(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		code int
	}{
		{"status", []string{"status"}, ExitOK},
		{"status-json", []string{"status", "-o", "json"}, ExitOK},
		{"status-yaml", []string{"status", "-o", "yaml"}, ExitOK},
		{"status-color", []string{"status", "--color", "always"}, ExitOK},
		{"host-list", []string{"host", "list"}, ExitOK},
		{"host-list-wide", []string{"host", "list", "-o", "wide"}, ExitOK},
		{"host-list-name", []string{"host", "list", "-o", "name", "-n", "/acme/prod"}, ExitOK},
		{"host-list-json", []string{"host", "list", "-o", "json", "-n", "/acme/dev"}, ExitOK},
		{"host-show", []string{"host", "show", "h2"}, ExitOK},
		{"host-show-by-name", []string{"host", "show", "db-1"}, ExitOK},
		{"workload-list", []string{"workload", "list"}, ExitOK},
		{"workload-list-wide", []string{"workload", "list", "-o", "wide"}, ExitOK},
		{"workload-list-name", []string{"workload", "list", "-o", "name"}, ExitOK},
		{"policy-list", []string{"policy", "list"}, ExitOK},
		{"policy-list-wide", []string{"policy", "list", "-o", "wide"}, ExitOK},
		{"policy-list-name", []string{"policy", "list", "-o", "name"}, ExitOK},
		{"policy-list-yaml", []string{"policy", "list", "-o", "yaml"}, ExitOK},
		{"policy-get", []string{"policy", "get", "/acme/prod/web-may-call-api", "namespace:/acme"}, ExitOK},
		{"policy-get-json", []string{"policy", "get", "external:/acme/office", "-o", "json"}, ExitOK},
		{"policy-history", []string{"policy", "history"}, ExitOK},
		{"policy-history-wide", []string{"policy", "history", "-o", "wide"}, ExitOK},
		{"policy-history-name", []string{"policy", "history", "-o", "name"}, ExitOK},
		{"policy-history-show", []string{"policy", "history", "show", "12"}, ExitOK},
		{"policy-history-show-yaml", []string{"policy", "history", "show", "12", "-o", "yaml"}, ExitOK},
		{"policy-rollback", []string{"policy", "rollback", "--yes", "10"}, ExitOK},
		{"flows", []string{"flows"}, ExitOK},
		{"flows-wide", []string{"flows", "-o", "wide"}, ExitOK},
		{"flows-json", []string{"flows", "-o", "json"}, ExitOK},
		{"flows-name", []string{"flows", "-o", "name"}, ExitOK},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			populate(w.admin)
			r := w.run(tt.args...)
			if r.code != tt.code {
				t.Fatalf("exit code %d, want %d; stderr:\n%s", r.code, tt.code, r.stderr)
			}
			golden(t, tt.name, r.stdout)
		})
	}
}

func TestNamespaceList(t *testing.T) {
	w := newWorld(t)
	populate(w.admin)
	w.admin.list.Resources = w.admin.list.Resources[:1]
	golden(t, "namespace-list", w.run("namespace", "list", "-o", "wide").stdout)
}

func TestExplain(t *testing.T) {
	for name, allow := range map[string]bool{"explain-allowed": true, "explain-denied": false} {
		w := newWorld(t)
		w.admin.explain = explanation(allow)
		r := w.run("explain", "--from", "app=web,env=prod,env=qa@/acme/prod", "--to", "203.0.113.9", "--port", "5432")
		want := ExitOK
		if !allow {
			want = ExitNegative
		}
		if r.code != want || r.stderr != "" {
			t.Errorf("%s: exit code %d, want %d; stderr %q", name, r.code, want, r.stderr)
		}
		golden(t, name, r.stdout)
	}
}

// What was recorded stands beside what policy says now.
func TestExplainFlow(t *testing.T) {
	w := newWorld(t)
	w.admin.explain = explanation(false)
	w.admin.explain.From = &symbolonv1.ExplainEndpoint{Namespace: "/acme/prod", Attributes: map[string]*symbolonv1.LabelValues{"app": values("web")}}
	w.admin.explain.To = &symbolonv1.ExplainEndpoint{Address: "203.0.113.9"}
	w.admin.explain.Protocol, w.admin.explain.Port = "tcp", 443
	w.admin.explain.Records = []*symbolonv1.FlowRecord{flowsOfTheTest()[0].GetRecord(), flowsOfTheTest()[2].GetRecord()}
	r := w.run("explain", "--flow", "00010203")
	if r.code != ExitNegative {
		t.Errorf("exit code %d, want %d; stderr %q", r.code, ExitNegative, r.stderr)
	}
	golden(t, "explain-flow", r.stdout)
}

// The answer is no in every format.
func TestExplainJSONKeepsTheExitCode(t *testing.T) {
	w := newWorld(t)
	w.admin.explain = explanation(false)
	if r := w.run("explain", "--from", "@/a", "--to", "@/b", "--port", "tcp/1", "-o", "json"); r.code != ExitNegative {
		t.Errorf("exit code %d, want %d", r.code, ExitNegative)
	}
}

func TestExitCodes(t *testing.T) {
	status := []string{"status"}
	for _, tt := range []struct {
		name string
		fail error
		args []string
		env  map[string]string
		want int
	}{
		{name: "ok", args: status, want: ExitOK},
		{name: "unknown command", args: []string{"frobnicate"}, want: ExitUsage},
		{name: "unknown flag", args: []string{"status", "--frobnicate"}, want: ExitUsage},
		{name: "group without a command", args: []string{"policy"}, want: ExitUsage},
		{name: "too many arguments", args: []string{"status", "x"}, want: ExitUsage},
		{name: "bad format", args: []string{"status", "-o", "xml"}, want: ExitUsage},
		{name: "bad colour", args: []string{"status", "--color", "blue"}, want: ExitUsage},
		{name: "bad outcome", args: []string{"flows", "--outcome", "unspecified"}, want: ExitUsage},
		{name: "bad kind", args: []string{"policy", "list", "--kind", "pod"}, want: ExitUsage},
		{name: "bad reference", args: []string{"policy", "get", "web"}, want: ExitUsage},
		{name: "no file", args: []string{"policy", "apply"}, want: ExitUsage},
		{name: "rollback without anybody to ask", args: []string{"policy", "rollback", "10"}, want: ExitUsage},
		{name: "rollback of what has moved", fail: connect.NewError(connect.CodeAborted, errString("x")), args: []string{"policy", "rollback", "--yes", "10"}, want: ExitConflict},
		{name: "missing file", args: []string{"policy", "apply", "-f", "/does/not/exist"}, want: ExitUsage},
		{name: "rotate nothing", args: []string{"ca", "rotate"}, want: ExitUsage},
		{name: "rotate both", args: []string{"ca", "rotate", "--root", "--intermediate"}, want: ExitUsage},
		{name: "a root's step of the intermediate", args: []string{"ca", "rotate", "--intermediate", "--sign"}, want: ExitUsage},
		{name: "two steps at once", args: []string{"ca", "rotate", "--root", "--sign", "--finish"}, want: ExitUsage},
		{name: "a start by force", args: []string{"ca", "rotate", "--root", "--force"}, want: ExitUsage},
		{name: "a step that hosts stand against", fail: connect.NewError(connect.CodeFailedPrecondition, errString("x")), args: []string{"ca", "rotate", "--root", "--sign"}, want: ExitNegative},
		{name: "removal without anybody to ask", args: []string{"host", "remove", "h1"}, want: ExitUsage},
		{name: "a scheme in the address", args: []string{"status", "--controller", "https://x"}, want: ExitUsage},
		{name: "no CA file", args: []string{"status", "--ca-file", "/does/not/exist"}, want: ExitUsage},
		{name: "not a CA file", args: []string{"status", "--ca-file", "/dev/null"}, want: ExitUsage},
		{name: "no token file", args: []string{"status", "--token-file", "/does/not/exist"}, want: ExitUsage},
		{name: "empty token file", args: []string{"status", "--token-file", "/dev/null"}, want: ExitUsage},
		{name: "nobody listens", args: []string{"status", "--controller", "127.0.0.1:1"}, want: ExitUnreachable},
		{name: "unknown host", args: []string{"host", "show", "nobody"}, want: ExitNegative},
		{name: "unknown resource", args: []string{"policy", "get", "/acme/nothing"}, want: ExitNegative},
		{name: "invalid", fail: connect.NewError(connect.CodeInvalidArgument, errString("x")), args: status, want: ExitUsage},
		{name: "not found", fail: connect.NewError(connect.CodeNotFound, errString("x")), args: status, want: ExitNegative},
		{name: "precondition", fail: connect.NewError(connect.CodeFailedPrecondition, errString("x")), args: status, want: ExitNegative},
		{name: "unavailable", fail: connect.NewError(connect.CodeUnavailable, errString("x")), args: status, want: ExitUnreachable},
		{name: "internal", fail: connect.NewError(connect.CodeInternal, errString("x")), args: status, want: ExitUnreachable},
		{name: "forbidden", fail: connect.NewError(connect.CodePermissionDenied, errString("x")), args: status, want: ExitRefused},
		{name: "exhausted", fail: connect.NewError(connect.CodeResourceExhausted, errString("x")), args: status, want: ExitRefused},
		{name: "aborted", fail: connect.NewError(connect.CodeAborted, errString("x")), args: status, want: ExitConflict},
		{name: "exists", fail: connect.NewError(connect.CodeAlreadyExists, errString("x")), args: status, want: ExitConflict},
		{name: "stream forbidden", fail: connect.NewError(connect.CodePermissionDenied, errString("x")), args: []string{"flows"}, want: ExitRefused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			populate(w.admin)
			w.admin.fail = tt.fail
			r := w.run(tt.args...)
			if r.code != tt.want {
				t.Errorf("exit code %d, want %d; stderr:\n%s", r.code, tt.want, r.stderr)
			}
			if tt.want != ExitOK && (r.stdout != "" || r.stderr == "") {
				t.Errorf("stdout %q, stderr %q: want the error on stderr alone", r.stdout, r.stderr)
			}
		})
	}
}

func TestExitConflictForAnAmbiguousHostname(t *testing.T) {
	w := newWorld(t)
	w.admin.hosts = &symbolonv1.ListHostsResponse{Hosts: []*symbolonv1.Host{{Id: "1", Hostname: "x"}, {Id: "2", Hostname: "x"}}}
	if r := w.run("host", "remove", "x", "--yes"); r.code != ExitConflict {
		t.Errorf("exit code %d, want %d", r.code, ExitConflict)
	}
	if _, removed := w.admin.asked().(*symbolonv1.RemoveHostRequest); removed {
		t.Error("a host was removed")
	}
}

func TestHostRemove(t *testing.T) {
	for _, readmit := range []bool{false, true} {
		w := newWorld(t)
		w.admin.hosts = &symbolonv1.ListHostsResponse{Hosts: []*symbolonv1.Host{{Id: "1", Hostname: "x"}}}
		args := []string{"host", "remove", "x", "--yes"}
		if readmit {
			args = append(args, "--readmit")
		}
		if r := w.run(args...); r.code != ExitOK {
			t.Errorf("exit code %d: %s", r.code, r.stderr)
		}
		if m, ok := w.admin.asked().(*symbolonv1.RemoveHostRequest); !ok || m.GetId() != "1" || m.GetReadmit() != readmit {
			t.Errorf("asked for %v", w.admin.asked())
		}
	}
}

// A promise of the manual: help that explains, and an example, everywhere.
func TestEveryCommandHasLongHelpAndExample(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Name() == "help" || c.Parent() != nil && c.Parent().Name() == "completion" {
			return // cobra's own
		}
		if len(c.Long) < 60 || c.Example == "" || c.Short == "" {
			t.Errorf("%s: long help %d bytes, example %d bytes", c.CommandPath(), len(c.Long), len(c.Example))
		}
		for _, child := range c.Commands() {
			walk(child)
		}
	}
	walk(newApp(Env{}).rootCommand())
}

func TestAgo(t *testing.T) {
	for _, tt := range []struct {
		d    time.Duration
		want string
	}{
		{0, "now"}, {5 * time.Second, "5s ago"}, {-90 * time.Minute, "in 1h"}, {47 * time.Hour, "47h ago"},
		{49 * time.Hour, "2d ago"}, {-3 * 365 * 24 * time.Hour, "in 3y"},
	} {
		if got := ago(now, timestamppb.New(now.Add(-tt.d))); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.d, got, tt.want)
		}
	}
	if got := ago(now, nil); got != "" {
		t.Errorf("never: %q", got)
	}
}
