package controller_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const scanned = tree + `---
kind: Profile
namespace: /acme/prod
name: vulnerable
match: {vuln.critical: {exists: true}}
labels: {app: vulnerable}
claims: [vuln.*, image.signed]
`

var (
	hashA = strings.Repeat("a", 64)
	hashB = strings.Repeat("b", 64)
)

func finding(exe string, pairs ...string) *symbolonv1.ScanFinding {
	return &symbolonv1.ScanFinding{ExeSha256: exe, Attributes: attributes(pairs...)}
}

func (w *world) push(scanner string, ttl time.Duration, findings ...*symbolonv1.ScanFinding) *symbolonv1.PushScanResponse {
	w.t.Helper()
	res, err := w.admin().PushScan(w.t.Context(), connect.NewRequest(&symbolonv1.PushScanRequest{Scanner: scanner, Ttl: durationpb.New(ttl), Findings: findings}))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg
}

// claim is what one claim of a workload's next SVID says.
func (h *host) claim(t *testing.T, key string, pairs ...string) (out []string) {
	t.Helper()
	res, err := h.issue(t.Context(), t, pairs...)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range principal(t, h.HostCredential, res.GetSvid()).Attributes.Of(key) {
		out = append(out, a.Value)
	}
	return out
}

func TestScansJoinSVIDs(t *testing.T) {
	w := newWorld(t)
	w.apply(scanned)
	h := w.enrol("/acme/prod", nil)
	exe := []string{"proc.exe", "/opt/x", "proc.exe_sha256", hashA}
	if got := h.claim(t, "vuln.critical", exe...); got != nil {
		t.Errorf("before a scan: %v", got)
	}
	w.push("trivy", time.Hour, finding(hashA, "vuln.critical", "CVE-2026-1"))
	w.push("grype", time.Hour, finding(hashA, "vuln.critical", "CVE-2026-2"), finding(hashB, "vuln.critical", "CVE-2026-3"))
	if got := h.claim(t, "vuln.critical", exe...); !slices.Equal(got, []string{"CVE-2026-1", "CVE-2026-2"}) {
		t.Errorf("of two scanners: %v", got)
	}
	if got := h.claim(t, "app", exe...); !slices.Equal(got, []string{"vulnerable"}) {
		t.Errorf("labels by it: %v", got)
	}
	w.push("trivy", time.Hour, finding(hashA, "vuln.low", "CVE-2026-4"))
	if got := h.claim(t, "vuln.critical", exe...); !slices.Equal(got, []string{"CVE-2026-2"}) {
		t.Errorf("after another scan of the one: %v", got)
	}
	if got := h.claim(t, "vuln.critical", "proc.exe", "/opt/x", "proc.exe_sha256", strings.Repeat("c", 64)); got != nil {
		t.Errorf("of another executable: %v", got)
	}

	// Of an image; and what the host says of the same key does not count.
	digest := "sha256:" + hashB
	w.push("cosign", time.Hour, &symbolonv1.ScanFinding{ImageDigest: digest, Attributes: attributes("image.signed", "no", "vuln.critical", "x")})
	if got := h.claim(t, "image.signed", "image.digest", digest, "image.signed", "yes"); !slices.Equal(got, []string{"no"}) {
		t.Errorf("the host overruled the scanner: %v", got)
	}
	_, err := h.issue(t.Context(), t, append(exe, "vuln.critical", "none")...)
	wantCode(t, err, connect.CodePermissionDenied, "vuln.critical")

	res, err := w.admin().ListScans(t.Context(), connect.NewRequest(&symbolonv1.ListScansRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range res.Msg.GetScans() {
		if !strings.HasPrefix(s.GetActor(), "admin token from 127.0.0.1") || !s.GetUntil().AsTime().After(time.Now()) {
			t.Errorf("%v does not say who and until when", s)
		}
		got = append(got, s.GetScanner()+" "+s.GetFinding().GetExeSha256()+s.GetFinding().GetImageDigest())
	}
	if want := []string{"grype " + hashA, "trivy " + hashA, "grype " + hashB, "cosign " + digest}; !slices.Equal(got, want) {
		t.Errorf("list %v", got)
	}
}

// A scan reaches the hosts that run what it is about, at once, and no others.
func TestScansTellTheHostsConcerned(t *testing.T) {
	w := newWorld(t)
	w.apply(scanned)
	one, other := w.enrol("/acme/prod", nil), w.enrol("/acme/prod", nil)
	one.claim(t, "app", "proc.exe", "/opt/x", "proc.exe_sha256", hashA)
	one.claim(t, "app", "proc.exe", "/opt/x", "proc.exe_sha256", strings.Repeat("d", 64)) // another build, the same name
	other.claim(t, "app", "proc.exe", "/opt/x", "proc.exe_sha256", hashB)
	a, b := one.open(t, &symbolonv1.Hello{}), other.open(t, &symbolonv1.Hello{})
	for _, s := range []*session{a, b} {
		s.ack(s.generation().GetNumber(), "")
	}
	if res := w.push("trivy", time.Hour, finding(hashA, "vuln.critical", "CVE-2026-1")); res.GetHosts() != 1 || res.GetChanged() != 1 {
		t.Errorf("%v", res)
	}
	a.reissue()
	if res := w.push("trivy", 2*time.Hour, finding(hashA, "vuln.critical", "CVE-2026-1")); res.GetHosts() != 0 || res.GetChanged() != 0 {
		t.Errorf("the same again: %v", res)
	}
	removed, err := w.admin().RemoveScans(t.Context(), connect.NewRequest(&symbolonv1.RemoveScansRequest{Scanner: "trivy"}))
	if err != nil || removed.Msg.GetRemoved() != 1 || removed.Msg.GetHosts() != 1 {
		t.Errorf("removed %v, %v", removed, err)
	}
	a.reissue()
	w.push("trivy", 10*time.Minute, finding(hashA, "vuln.critical", "CVE-2026-1"))
	a.reissue()
	one.claim(t, "app", "proc.exe", "/opt/x", "proc.exe_sha256", hashA)
	w.offset.Store(int64(11 * time.Minute))
	a.reissue() // it has ended
	res, err := one.issue(t.Context(), t, "proc.exe", "/opt/x", "proc.exe_sha256", hashA)
	if err != nil || len(res.GetProfiles()) != 0 {
		t.Errorf("after its end: %v, %v", res.GetProfiles(), err)
	}
	// The other one hears of the next generation, and of nothing before it.
	w.apply("kind: Namespace\nname: /later\nmode: enforce\n")
	b.generation()
}

// A host that was away is told when it comes back, over a restart of the controller.
func TestScansTellWhoWasAway(t *testing.T) {
	w := newWorld(t)
	w.apply(scanned)
	h := w.enrol("/acme/prod", nil)
	h.claim(t, "app", "proc.exe", "/opt/x", "proc.exe_sha256", hashA)
	s := h.open(t, &symbolonv1.Hello{})
	has := s.generation().GetNumber()
	s.ack(has, "")
	w.push("trivy", time.Hour, finding(hashB, "vuln.critical", "CVE-2026-1"))
	comeBack := func() *session {
		h.ProxyServiceClient = w.proxy(h.TLS())
		s := h.open(t, &symbolonv1.Hello{Generation: has})
		s.ack(s.generation().GetNumber(), "")
		return s
	}
	quiet := func(s *session, name string) {
		t.Helper()
		w.apply("kind: Namespace\nname: /" + name + "\nmode: enforce\n")
		has = s.generation().GetNumber()
		s.ack(has, "")
	}
	quiet(comeBack(), "one") // it runs nothing of that
	w.push("trivy", time.Hour, finding(hashA, "vuln.critical", "CVE-2026-1"))
	w.halt()
	w.cfg.Listen = "127.0.0.1:0"
	w.start()
	comeBack().reissue()
	h.claim(t, "app", "proc.exe", "/opt/x", "proc.exe_sha256", hashA)
	last := comeBack()
	quiet(last, "two")
	if got := h.claim(t, "vuln.critical", "proc.exe", "/opt/x", "proc.exe_sha256", hashA); !slices.Equal(got, []string{"CVE-2026-1"}) {
		t.Errorf("after a restart: %v", got)
	}
	// Its end, too.
	_ = last.stream.CloseRequest()
	eventually(t, "the host is away", func() bool { return !w.hostOf(h).GetConnected() })
	w.offset.Store(int64(2 * time.Hour))
	comeBack().reissue()
}

func TestScansAreRefused(t *testing.T) {
	w := newWorld(t)
	many := make([]string, 0, 130)
	for i := range 65 {
		many = append(many, fmt.Sprintf("vuln.v%d", i), "x")
	}
	good := finding(hashA, "vuln.low", "x")
	for name, tt := range map[string]struct {
		req   *symbolonv1.PushScanRequest
		words []string
	}{
		"no scanner":         {&symbolonv1.PushScanRequest{Findings: []*symbolonv1.ScanFinding{good}}, []string{"scanner"}},
		"a scanner's escape": {&symbolonv1.PushScanRequest{Scanner: "a|b", Findings: []*symbolonv1.ScanFinding{good}}, []string{"scanner"}},
		"nothing":            {&symbolonv1.PushScanRequest{Scanner: "s"}, []string{"0 findings"}},
		"too long":           {&symbolonv1.PushScanRequest{Scanner: "s", Ttl: durationpb.New(100 * 24 * time.Hour), Findings: []*symbolonv1.ScanFinding{good}}, []string{"ttl"}},
		"no subject":         {&symbolonv1.PushScanRequest{Scanner: "s", Findings: []*symbolonv1.ScanFinding{{}}}, []string{"finding 1", "exe_sha256"}},
		"two subjects":       {&symbolonv1.PushScanRequest{Scanner: "s", Findings: []*symbolonv1.ScanFinding{{ExeSha256: hashA, ImageDigest: "sha256:" + hashA}}}, []string{"one of them"}},
		"no hash":            {&symbolonv1.PushScanRequest{Scanner: "s", Findings: []*symbolonv1.ScanFinding{finding(strings.ToUpper(hashA))}}, []string{"sha256sum"}},
		"no digest":          {&symbolonv1.PushScanRequest{Scanner: "s", Findings: []*symbolonv1.ScanFinding{{ImageDigest: hashA}}}, []string{"sha256:"}},
		"twice":              {&symbolonv1.PushScanRequest{Scanner: "s", Findings: []*symbolonv1.ScanFinding{good, good}}, []string{"finding 2", "finding 1"}},
		"a label":            {&symbolonv1.PushScanRequest{Scanner: "s", Findings: []*symbolonv1.ScanFinding{finding(hashA, "app", "db")}}, []string{"app", "vuln.*"}},
		"a host's":           {&symbolonv1.PushScanRequest{Scanner: "s", Findings: []*symbolonv1.ScanFinding{finding(hashA, "host.role", "db")}}, []string{"host.role"}},
		"the image's name":   {&symbolonv1.PushScanRequest{Scanner: "s", Findings: []*symbolonv1.ScanFinding{finding(hashA, "image.digest", "x")}}, []string{"image.digest", "host"}},
		"an escape":          {&symbolonv1.PushScanRequest{Scanner: "s", Findings: []*symbolonv1.ScanFinding{finding(hashA, "vuln.low", "\x1b[2J")}}, []string{"vuln.low"}},
		"too many":           {&symbolonv1.PushScanRequest{Scanner: "s", Findings: []*symbolonv1.ScanFinding{finding(hashA, many...)}}, []string{"65", "64"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.admin().PushScan(t.Context(), connect.NewRequest(tt.req))
			wantCode(t, err, connect.CodeInvalidArgument, tt.words...)
		})
	}
	_, err := w.admin().RemoveScans(t.Context(), connect.NewRequest(&symbolonv1.RemoveScansRequest{}))
	wantCode(t, err, connect.CodeInvalidArgument, "scanner")
	_, err = w.admin().RemoveScans(t.Context(), connect.NewRequest(&symbolonv1.RemoveScansRequest{Scanner: "nobody"}))
	wantCode(t, err, connect.CodeNotFound)
}

// What scanners may make a controller keep has an end.
func TestScansAreBounded(t *testing.T) {
	w := newWorld(t)
	admin := w.admin()
	for n := range 51 {
		req := &symbolonv1.PushScanRequest{Scanner: "s"}
		for i := range 1000 {
			req.Findings = append(req.Findings, finding(fmt.Sprintf("%064x", n*1000+i)))
		}
		_, err := admin.PushScan(t.Context(), connect.NewRequest(req))
		if n < 50 && err != nil {
			t.Fatal(err)
		}
		if n == 50 {
			wantCode(t, err, connect.CodeResourceExhausted, "50000", "scan remove")
		}
	}
}
