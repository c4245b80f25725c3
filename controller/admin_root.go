package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/controller/store"
)

// maxNamed is how many hosts an error names.
const maxNamed = 20

// RotateRoot takes one step of the root's rotation, if no host would lose by it or the
// operator wants it anyway.
func (s adminService) RotateRoot(ctx context.Context, req *connect.Request[symbolonv1.RotateRootRequest]) (*connect.Response[symbolonv1.RotateRootResponse], error) {
	s.rotating.Lock()
	defer s.rotating.Unlock()
	actor, step := actorOf(req.Peer()), req.Msg.GetStep()
	if _, known := symbolonv1.RootStep_name[int32(step)]; !known || step == symbolonv1.RootStep_ROOT_STEP_UNSPECIFIED {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the step is missing, or unknown to this controller"))
	}
	was := s.ca.Status().RootRotation
	passed, err := s.passRoot(ctx, step, was, req.Msg.GetForce())
	if err != nil {
		return nil, err
	}
	changed, err := s.stepRoot(ctx, step, actor)
	if errors.Is(err, ca.ErrPhase) || errors.Is(err, ca.ErrUpstream) {
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	if err != nil {
		return nil, s.internal("rotate the root", err)
	}
	res := &symbolonv1.RotateRootResponse{Changed: changed}
	if changed {
		s.log.Info("root rotation", zap.Stringer("step", step), zap.String("actor", actor), zap.Int("passed_over", len(passed)),
			zap.Uint64("bundle_version", s.ca.Status().RootRotation.Version), zap.String("ca_pin", s.ca.Pin()))
		res.PassedOver = passed
		if err := s.rootChanged(ctx, step, was, res); err != nil {
			return nil, err
		}
	}
	if res.Rotation, err = s.rootRotation(ctx); err != nil {
		return nil, err
	}
	hosts, _, err := s.hosts.list(ctx)
	if err != nil {
		return nil, s.internal("list hosts", err)
	}
	for _, h := range hosts {
		if s.hub.presence(h.ID).connected {
			res.HostsConnected++
		} else {
			res.HostsAway++
		}
	}
	return connect.NewResponse(res), nil
}

func (s *Server) stepRoot(ctx context.Context, step symbolonv1.RootStep, actor string) (changed bool, err error) {
	switch step {
	case symbolonv1.RootStep_ROOT_STEP_START:
		return s.ca.StartRoot(ctx, actor)
	case symbolonv1.RootStep_ROOT_STEP_SIGN:
		return s.ca.SignRoot(ctx, actor)
	case symbolonv1.RootStep_ROOT_STEP_FINISH:
		return s.ca.FinishRoot(ctx, actor)
	default:
		return s.ca.AbortRoot(ctx)
	}
}

// passRoot is the barrier before a step: it returns the hosts that force passes over.
// Errors: failed_precondition.
func (s *Server) passRoot(ctx context.Context, step symbolonv1.RootStep, r ca.RootRotation, force bool) ([]*symbolonv1.RootBehind, error) {
	sign := step == symbolonv1.RootStep_ROOT_STEP_SIGN && r.Phase == ca.PhasePublish
	finish := step == symbolonv1.RootStep_ROOT_STEP_FINISH && r.Phase == ca.PhaseSign
	if !sign && !finish {
		return nil, nil // nobody loses by it, or it is no step
	}
	behind, err := s.rootBehind(ctx, r)
	if err != nil || force {
		return behind, err
	}
	if len(behind) > 0 && sign {
		return nil, refused(connect.CodeFailedPrecondition, fmt.Sprintf(
			"%d hosts have not acknowledged that they believe the next root: %s; have them connect, or remove those that are gone ('symbolon host remove'); with --force they are passed over: they must connect before the end of the rotation, or enrol again",
			len(behind), namesOf(behind)))
	}
	if len(behind) > 0 {
		return nil, refused(connect.CodeFailedPrecondition, fmt.Sprintf(
			"%d hosts have SVIDs of the old root, or have not acknowledged the new one: %s; have them connect, or wait until those SVIDs have ended ('symbolon ca status'); with --force they are cut off: what they have is refused, and hosts whose own SVID that is must enrol again",
			len(behind), namesOf(behind)))
	}
	if until := s.federationUntil(r); finish && !until.IsZero() {
		return nil, refused(connect.CodeFailedPrecondition, fmt.Sprintf(
			"other trust domains that follow this one's bundle may not have asked for it since the rotation began; wait until %s (federation.refresh_hint), or --force and they may refuse this trust domain until they have asked",
			until.UTC().Format(time.RFC3339)))
	}
	return nil, nil
}

func namesOf(behind []*symbolonv1.RootBehind) string {
	var names []string
	for _, b := range behind[:min(len(behind), maxNamed)] {
		where := "away"
		if b.GetConnected() {
			where = "connected"
		}
		names = append(names, fmt.Sprintf("%s (%s, %s)", b.GetHostId(), b.GetHostname(), where))
	}
	if n := len(behind) - len(names); n > 0 {
		names = append(names, fmt.Sprintf("and %d more", n))
	}
	return strings.Join(names, ", ")
}

// rootChanged tells everybody what a step has made of the roots.
func (s *Server) rootChanged(ctx context.Context, step symbolonv1.RootStep, was ca.RootRotation, res *symbolonv1.RotateRootResponse) error {
	if err := s.writeRoots(); err != nil {
		s.log.Error("ca.pem is not what it should be; the next start writes it", zap.Error(err))
	}
	if step == symbolonv1.RootStep_ROOT_STEP_SIGN {
		s.hub.reissue(s.hub.seen()) // the roots are the same
		return nil
	}
	s.hub.publish(s.policies.distribution())
	if step == symbolonv1.RootStep_ROOT_STEP_FINISH {
		n, err := s.voidTokens(ctx, was.Signed)
		if err != nil {
			return s.internal("void join tokens", err)
		}
		res.Tokens = uint32(n)
	}
	return nil
}

// voidTokens forgets the join tokens that were made before the new root signed, and not
// used: they pin the old one, so no host would believe this controller by them.
func (s *Server) voidTokens(ctx context.Context, before time.Time) (n int, err error) {
	kvs, _, err := s.store.List(ctx, tokenPrefix)
	if err != nil {
		return 0, err
	}
	var ops []store.Op
	for _, kv := range kvs {
		t := &tokenRecord{}
		if err := getJSON(kv, t); err != nil {
			return 0, err
		}
		if t.UsedBy == "" && t.Created.Before(before) {
			ops = append(ops, store.Delete(kv.Key))
			if s.opts.Now().Before(t.Expires) {
				n++
			}
		}
	}
	if len(ops) == 0 {
		return 0, nil
	}
	_, _, err = s.store.Txn(ctx, nil, ops)
	return n, err
}

// rootRotation is its state for people; nil: there was none.
func (s *Server) rootRotation(ctx context.Context) (*symbolonv1.RootRotation, error) {
	r := s.ca.Status().RootRotation
	if r.Version == 0 || s.upstream != nil { // SPIRE's are rotated there
		return nil, nil
	}
	out := &symbolonv1.RootRotation{
		BundleVersion: r.Version, Crossed: r.Crossed,
		Started: moment(r.Started), StartedBy: r.StartedBy, Signed: moment(r.Signed), SignedBy: r.SignedBy,
		Finished: moment(r.Finished), FinishedBy: r.FinishedBy,
	}
	switch r.Phase {
	case ca.PhasePublish:
		out.Phase = symbolonv1.RootPhase_ROOT_PHASE_PUBLISH
	case ca.PhaseSign:
		out.Phase = symbolonv1.RootPhase_ROOT_PHASE_SIGN
	default:
		return out, nil
	}
	out.Other, out.FederationUntil = certificateProto(r.Other), moment(s.federationUntil(r))
	var err error
	if out.Behind, err = s.rootBehind(ctx, r); err != nil {
		return nil, s.internal("list hosts", err)
	}
	return out, nil
}

// federationUntil is when every follower of the bundle had the time to ask for the one
// with the next root; zero: it had, or nobody can ask.
func (s *Server) federationUntil(r ca.RootRotation) time.Time {
	until := r.Started.Add(s.cfg.Federation.RefreshHint)
	if s.bundleEndpoint == nil || !s.opts.Now().Before(until) {
		return time.Time{}
	}
	return until
}

// rootBehind are the hosts that the next step of the root's rotation would cost
// something, by name: they have not acknowledged the roots, or, once the new one signs,
// have something valid of the old one, as far as is known. Those whose SVID has ended must
// enrol again anyway, and what is revoked can get nothing newer.
func (s *Server) rootBehind(ctx context.Context, r ca.RootRotation) ([]*symbolonv1.RootBehind, error) {
	hosts, _, err := s.hosts.list(ctx)
	if err != nil {
		return nil, err
	}
	type held struct {
		n     uint32
		until time.Time
	}
	ofOld := make(map[string]held)
	for _, w := range s.inventory.list("") {
		if !s.ca.OfOldRoot(w.Issuer) {
			continue
		}
		if p, err := w.principal(); err != nil || s.refuseRevoked(w.HostID, w.serial(), p) != nil {
			continue
		}
		h := ofOld[w.HostID]
		h.n++
		if w.NotAfter.After(h.until) {
			h.until = w.NotAfter
		}
		ofOld[w.HostID] = h
	}
	var out []*symbolonv1.RootBehind
	for _, h := range hosts {
		if s.refuseRevoked(h.ID, "", nil) != nil {
			continue
		}
		w := ofOld[h.ID]
		valid := s.opts.Now().Before(h.SVIDNotAfter)
		b := &symbolonv1.RootBehind{
			HostId: h.ID, Hostname: h.Hostname, Connected: s.hub.presence(h.ID).connected,
			Acknowledged: !valid || h.Bundle == r.Version, HostSvid: valid && s.ca.OfOldRoot(h.Issuer), Workloads: w.n,
		}
		if b.HostSvid && h.SVIDNotAfter.After(w.until) {
			w.until = h.SVIDNotAfter
		}
		b.Until = moment(w.until)
		if !b.Acknowledged || b.HostSvid || b.Workloads > 0 {
			out = append(out, b)
		}
	}
	slices.SortFunc(out, func(a, b *symbolonv1.RootBehind) int {
		return cmp.Or(cmp.Compare(a.GetHostname(), b.GetHostname()), cmp.Compare(a.GetHostId(), b.GetHostId()))
	})
	return out, nil
}
