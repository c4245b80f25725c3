package cli

import (
	"context"
	"fmt"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// rootSteps are the flags of `ca rotate --root`.
type rootSteps struct{ sign, finish, abort, force bool }

func (r rootSteps) any() bool { return r.sign || r.finish || r.abort || r.force }

func (r rootSteps) step() (symbolonv1.RootStep, error) {
	step, n := symbolonv1.RootStep_ROOT_STEP_START, 0
	for _, f := range []struct {
		given bool
		step  symbolonv1.RootStep
	}{
		{r.sign, symbolonv1.RootStep_ROOT_STEP_SIGN},
		{r.finish, symbolonv1.RootStep_ROOT_STEP_FINISH},
		{r.abort, symbolonv1.RootStep_ROOT_STEP_ABORT},
	} {
		if f.given {
			step = f.step
			n++
		}
	}
	switch {
	case n > 1:
		return 0, usagef("--sign, --finish and --abort are steps of their own: give one")
	case r.force && !r.sign && !r.finish:
		return 0, usagef("--force goes with --sign or --finish: nobody loses by the other steps")
	}
	return step, nil
}

func (a *app) caRotateRoot(ctx context.Context, flags rootSteps) error {
	step, err := flags.step()
	if err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := call(ctx, a, c.RotateRoot, &symbolonv1.RotateRootRequest{Step: step, Force: flags.force})
	if err != nil {
		return err
	}
	r := resp.GetRotation()
	if err := a.write([]byte(rootPhase(r) + "\n")); err != nil {
		return err
	}
	for _, b := range resp.GetPassedOver() {
		a.warning("passed over: %s", a.rootBehind(b))
	}
	a.sayRootStep(step, resp)
	return nil
}

// sayRootStep says what a step has done, and what comes next.
func (a *app) sayRootStep(step symbolonv1.RootStep, resp *symbolonv1.RotateRootResponse) {
	if !resp.GetChanged() {
		a.say("nothing has changed: that step was taken before, or there is nothing to take it of")
		return
	}
	told := fmt.Sprintf("%d connected hosts hear of it now", resp.GetHostsConnected())
	if n := resp.GetHostsAway(); n > 0 {
		told += fmt.Sprintf(", %d when they come back", n)
	}
	switch step {
	case symbolonv1.RootStep_ROOT_STEP_START:
		a.say("the next root is believed, and signs nothing yet: %s", told)
		a.say("next: give copies of the new ca.pem to those who have one; when \"symbolon ca status\" names no host, \"symbolon ca rotate --root --sign\"")
	case symbolonv1.RootStep_ROOT_STEP_SIGN:
		a.say("the new root signs, and the old one's key is gone; hosts get their SVIDs anew: %s", told)
		if !resp.GetRotation().GetCrossed() {
			a.warning("the old root may not vouch for the new one: join tokens of before, and hosts that have not heard of it, are of no use")
		}
		a.say("next: give open connections two minutes to be renewed; when \"symbolon ca status\" names no host, \"symbolon ca rotate --root --finish\"")
	case symbolonv1.RootStep_ROOT_STEP_FINISH:
		a.say("the old root is believed no more: %s", told)
		if n := resp.GetTokens(); n > 0 {
			a.warning("%d join tokens that were not used yet are void, since they pin the old root: make new ones", n)
		}
		for _, b := range resp.GetPassedOver() {
			if b.GetHostSvid() || !b.GetAcknowledged() {
				a.warning("hosts that were passed over and stay away must enrol again: \"symbolon host token\", on the host \"symbolon-proxy forget\", and \"symbolon host remove\" for what they were")
				break
			}
		}
	case symbolonv1.RootStep_ROOT_STEP_ABORT:
		a.say("the next root is given up, and believed no more: %s", told)
	}
}

func rootPhase(r *symbolonv1.RootRotation) string {
	switch r.GetPhase() {
	case symbolonv1.RootPhase_ROOT_PHASE_PUBLISH:
		return "publish"
	case symbolonv1.RootPhase_ROOT_PHASE_SIGN:
		return "sign"
	}
	return "none"
}

// rootRotation is the part of `ca status` that is about the root's rotation.
func (a *app) rootRotation(r *symbolonv1.RootRotation) []pair {
	lines := []pair{{"root rotation", text(rootPhase(r))}}
	since := func(name string, when, by string) {
		lines = append(lines, pair{"  " + name, text(when + ", by " + by)})
	}
	other, ready := "", ""
	switch r.GetPhase() {
	case symbolonv1.RootPhase_ROOT_PHASE_PUBLISH:
		other, ready = "next root", "every host has acknowledged it: \"symbolon ca rotate --root --sign\""
		since("published", ago(a.Now(), r.GetStarted()), r.GetStartedBy())
	case symbolonv1.RootPhase_ROOT_PHASE_SIGN:
		other, ready = "old root", "nothing of the old root is left: \"symbolon ca rotate --root --finish\""
		since("signs since", ago(a.Now(), r.GetSigned()), r.GetSignedBy())
	default:
		if r.GetFinished() == nil {
			return nil
		}
		since("finished", ago(a.Now(), r.GetFinished()), r.GetFinishedBy())
		return lines
	}
	lines = append(lines, pair{"  " + other, text(fmt.Sprintf("%s, %s", r.GetOther().GetSubject(), r.GetOther().GetKey()))},
		pair{"    serial", text(r.GetOther().GetSerial())}, pair{"    ends", a.ending(r.GetOther())})
	if until := r.GetFederationUntil(); until != nil {
		lines = append(lines, pair{"  followers", text("other trust domains have asked for the bundle by " + absolute(a.Location, until))})
	}
	if len(r.GetBehind()) == 0 {
		return append(lines, pair{"  waits for", yes("nobody; " + ready)})
	}
	lines = append(lines, pair{"  waits for", warn(fmt.Sprintf("%d hosts", len(r.GetBehind())))})
	for _, b := range r.GetBehind() {
		lines = append(lines, pair{"    " + b.GetHostId(), text(a.rootBehind(b))})
	}
	return lines
}

// rootBehind is why a host stands against the next step.
func (a *app) rootBehind(b *symbolonv1.RootBehind) string {
	out := b.GetHostname() + ", connected"
	if !b.GetConnected() {
		out = b.GetHostname() + ", away"
	}
	if !b.GetAcknowledged() {
		out += ": has not acknowledged the roots"
	}
	if b.GetHostSvid() || b.GetWorkloads() > 0 {
		what := fmt.Sprintf("%d workloads", b.GetWorkloads())
		if b.GetHostSvid() {
			what = "its own, " + what
		}
		out += fmt.Sprintf("; SVIDs of the old root: %s, until %s", what, ago(a.Now(), b.GetUntil()))
	}
	return out
}
