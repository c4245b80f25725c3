package cli

import (
	"context"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (s *adminServer) GetCA(_ context.Context, r *connect.Request[symbolonv1.GetCARequest]) (*connect.Response[symbolonv1.GetCAResponse], error) {
	if err := s.admit(r.Header(), r.Msg); err != nil {
		return nil, err
	}
	return connect.NewResponse(s.ca), nil
}

func (s *adminServer) RotateRoot(_ context.Context, r *connect.Request[symbolonv1.RotateRootRequest]) (*connect.Response[symbolonv1.RotateRootResponse], error) {
	if err := s.admit(r.Header(), r.Msg); err != nil {
		return nil, err
	}
	return connect.NewResponse(s.rotated), nil
}

var (
	lateHost = &symbolonv1.RootBehind{HostId: "h1", Hostname: "db1", Connected: true}
	awayHost = &symbolonv1.RootBehind{HostId: "h2", Hostname: "db2", Acknowledged: true, HostSvid: true, Workloads: 3, Until: at(2 * time.Hour)}
)

// Each flag asks for its step; what the answer holds is said, what is lost as a warning.
func TestRotateRoot(t *testing.T) {
	for _, tt := range []struct {
		args   []string
		answer *symbolonv1.RotateRootResponse
		step   symbolonv1.RootStep
		force  bool
		stdout string
		stderr []string
	}{
		{
			args: nil, step: symbolonv1.RootStep_ROOT_STEP_START, stdout: "publish\n",
			answer: &symbolonv1.RotateRootResponse{Changed: true, HostsConnected: 4, HostsAway: 1, Rotation: &symbolonv1.RootRotation{Phase: symbolonv1.RootPhase_ROOT_PHASE_PUBLISH}},
			stderr: []string{"signs nothing yet", "4 connected", "1 when", "--root --sign"},
		},
		{
			args: []string{"--sign", "--force"}, step: symbolonv1.RootStep_ROOT_STEP_SIGN, force: true, stdout: "sign\n",
			answer: &symbolonv1.RotateRootResponse{Changed: true, PassedOver: []*symbolonv1.RootBehind{lateHost}, Rotation: &symbolonv1.RootRotation{Phase: symbolonv1.RootPhase_ROOT_PHASE_SIGN}},
			stderr: []string{"passed over: db1, connected: has not acknowledged", "may not vouch", "--root --finish"},
		},
		{
			args: []string{"--finish", "--force"}, step: symbolonv1.RootStep_ROOT_STEP_FINISH, force: true, stdout: "none\n",
			answer: &symbolonv1.RotateRootResponse{Changed: true, Tokens: 2, PassedOver: []*symbolonv1.RootBehind{awayHost}, Rotation: &symbolonv1.RootRotation{}},
			stderr: []string{"db2, away; SVIDs of the old root: its own, 3 workloads", "believed no more", "2 join tokens", "symbolon-proxy forget"},
		},
		{
			args: []string{"--abort"}, step: symbolonv1.RootStep_ROOT_STEP_ABORT, stdout: "none\n",
			answer: &symbolonv1.RotateRootResponse{Changed: true, Rotation: &symbolonv1.RootRotation{}}, stderr: []string{"given up"},
		},
		{
			args: []string{"--finish"}, step: symbolonv1.RootStep_ROOT_STEP_FINISH, stdout: "none\n",
			answer: &symbolonv1.RotateRootResponse{}, stderr: []string{"nothing has changed"},
		},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			w := newWorld(t)
			w.admin.rotated = tt.answer
			r := w.run(append([]string{"ca", "rotate", "--root"}, tt.args...)...)
			if r.code != ExitOK || r.stdout != tt.stdout {
				t.Errorf("code %d, stdout %q; stderr %s", r.code, r.stdout, r.stderr)
			}
			for _, word := range tt.stderr {
				if !strings.Contains(r.stderr, word) {
					t.Errorf("stderr lacks %q:\n%s", word, r.stderr)
				}
			}
			if m, ok := w.admin.asked().(*symbolonv1.RotateRootRequest); !ok || m.GetStep() != tt.step || m.GetForce() != tt.force {
				t.Errorf("asked for %v", w.admin.asked())
			}
		})
	}
}

func TestCAStatusOfARootRotation(t *testing.T) {
	w := newWorld(t)
	certificate := func(name string) *symbolonv1.CACertificate {
		return &symbolonv1.CACertificate{Subject: "CN=" + name, Serial: "54aa", Key: "ECDSA P-256", NotAfter: at(1000 * time.Hour)}
	}
	w.admin.ca = &symbolonv1.GetCAResponse{
		TrustDomain: "acme.example", Root: certificate("acme.example root 01"), Pin: "ab", Intermediate: certificate("acme.example intermediate"),
		SvidTtl: durationpb.New(24 * time.Hour),
	}
	show := func(words ...string) {
		t.Helper()
		r := w.run("ca", "status")
		for _, word := range words {
			if r.code != ExitOK || !strings.Contains(r.stdout, word) {
				t.Errorf("code %d, stdout lacks %q:\n%s%s", r.code, word, r.stdout, r.stderr)
			}
		}
	}
	if r := w.run("ca", "status"); strings.Contains(r.stdout, "root rotation") {
		t.Errorf("there was none:\n%s", r.stdout)
	}
	w.admin.ca.RootRotation = &symbolonv1.RootRotation{
		Phase: symbolonv1.RootPhase_ROOT_PHASE_PUBLISH, Other: certificate("acme.example root 02"), Started: at(-time.Hour), StartedBy: "somebody",
		Behind: []*symbolonv1.RootBehind{lateHost}, FederationUntil: at(time.Minute),
	}
	show("root rotation", "publish", "next root", "CN=acme.example root 02", "1h ago, by somebody", "1 hosts", "h1", "db1, connected: has not acknowledged", "other trust domains")
	w.admin.ca.RootRotation = &symbolonv1.RootRotation{
		Phase: symbolonv1.RootPhase_ROOT_PHASE_SIGN, Other: certificate("acme.example root"), Signed: at(-time.Hour), SignedBy: "somebody",
		Behind: []*symbolonv1.RootBehind{awayHost},
	}
	show("sign", "old root", "h2", "db2, away; SVIDs of the old root: its own, 3 workloads")
	w.admin.ca.RootRotation.Behind = nil
	show("nobody", "--root --finish")
	w.admin.ca.RootRotation = &symbolonv1.RootRotation{Finished: at(-time.Minute), FinishedBy: "somebody"}
	show("finished", "by somebody")
}
