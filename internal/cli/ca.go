package cli

import (
	"context"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) caCommand() *cobra.Command {
	return group("ca", "Revoke identities, and see and change what signs them",
		`Identities are certificates, valid for a day or so. Revoking one refuses it everywhere
within moments, and cuts its connections.`,
		`  symbolon ca revoke spiffe://acme.example/acme/prod/web --reason "key leaked"
  symbolon ca revocations
  symbolon ca unrevoke 4be1c09a7d21
  symbolon ca status`,
		a.caRevokeCommand(), a.caRevocationsCommand(), a.caUnrevokeCommand(), a.caStatusCommand(), a.caRotateCommand())
}

func (a *app) caRevokeCommand() *cobra.Command {
	req := &symbolonv1.RevokeRequest{}
	var host string
	var labelArgs []string
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "revoke [SPIFFE-ID] [--serial HEX | --host ID | --label KEY=VALUE...] --reason TEXT",
		Short: "Refuse an identity everywhere, and cut its connections",
		Long: `Refuse an identity everywhere. Every connected proxy hears of it at once; one that is
away, when it comes back. Open connections are cut, on both ends' hosts, new handshakes
and reused tunnels refused with the reason "revoked", and the identity's own host lets it
neither out nor in.

  SPIFFE-ID        whoever has this ID, also of another trust domain, until unrevoked;
                   no SVID is issued for it meanwhile
  --host           every SVID that was issued to a host, its own and its workloads',
                   until unrevoked; none is issued to it meanwhile. The same workloads
                   on other hosts are not touched. A host that stays revoked for as long
                   as its SVID is valid needs a new join token afterwards
  --label          every identity whose attributes have all of the values, until
                   unrevoked; none is issued meanwhile. spiffe.trust_domain=NAME stands
                   for a whole trust domain
  --serial         one certificate; its holder gets another one. It is forgotten when
                   the certificate has expired ("symbolon workload list -o wide" shows
                   serial numbers; --trust-domain says whose it is, if not ours: then
                   --for says when it may be forgotten, else it is until unrevoked)

"symbolon host remove" revokes a host for good.`,
		Example: `  symbolon ca revoke spiffe://acme.example/acme/prod/web --reason "key leaked"
  symbolon ca revoke --host web-1 --reason "intrusion, ticket 4711"
  symbolon ca revoke --label app=report --label env=prod --reason "bad release"`,
		Args: cobra.MaximumNArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) error {
			if len(args) == 1 {
				req.SpiffeId = args[0]
			}
			if ttl != 0 {
				req.Ttl = durationpb.New(ttl)
			}
			return a.caRevoke(ctx, req, host, labelArgs)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&req.Serial, "serial", "", "serial number of one certificate, hexadecimal")
	f.StringVar(&req.TrustDomain, "trust-domain", "", "whose serial number it is (default: the controller's trust domain)")
	f.DurationVar(&ttl, "for", 0, "with --trust-domain: forget it after so long, such as 24h: what is left of the certificate")
	f.StringVar(&host, "host", "", "id or hostname of an enrolled host")
	f.StringArrayVar(&labelArgs, "label", nil, "KEY=VALUE that the identity's attributes have (repeatable: all of them)")
	f.StringVar(&req.Reason, "reason", "", "why, for those who look at it later")
	return cmd
}

func (a *app) caRevoke(ctx context.Context, req *symbolonv1.RevokeRequest, host string, labelArgs []string) error {
	if req.GetReason() == "" {
		return usagef("--reason is needed: say why, for those who look at it later")
	}
	for _, l := range labelArgs {
		k, v, ok := strings.Cut(l, "=")
		if !ok || k == "" || v == "" {
			return usagef("--label %q: want KEY=VALUE", l)
		}
		if _, twice := req.Labels[k]; twice {
			return usagef("--label %s is given twice: no identity could be meant by both, revoke each by itself", k)
		}
		if req.Labels == nil {
			req.Labels = map[string]string{}
		}
		req.Labels[k] = v
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	if host != "" {
		hosts, err := a.hosts(ctx, c)
		if err != nil {
			return err
		}
		h, err := findHost(hosts.GetHosts(), host)
		if err != nil {
			return err
		}
		req.Host = h.GetId()
	}
	resp, err := call(ctx, a, c.Revoke, req)
	if err != nil {
		return err
	}
	r := resp.GetRecord()
	if err := a.write([]byte(r.GetRevocation().GetId() + "\n")); err != nil {
		return err
	}
	verb := "revoked"
	if resp.GetAlready() {
		verb = "revoked already"
	}
	a.say("%s: %s; workloads known to have it: %d", verb, revoked(r.GetRevocation()), resp.GetWorkloads())
	if n := resp.GetHostsAway(); n > 0 {
		a.warning("%d hosts are away, and hear of it when they come back", n)
	}
	return nil
}

// revoked is the subject in words.
func revoked(r *symbolonv1.Revocation) string {
	switch s := r.GetSubject().(type) {
	case *symbolonv1.Revocation_SpiffeId:
		return s.SpiffeId
	case *symbolonv1.Revocation_Serial:
		return "serial " + hex.EncodeToString(s.Serial.GetSerial()) + " of " + s.Serial.GetTrustDomain()
	case *symbolonv1.Revocation_Host:
		return "host " + s.Host.GetHostId()
	case *symbolonv1.Revocation_Labels:
		var pairs []string
		for _, k := range slices.Sorted(maps.Keys(s.Labels.GetLabels())) {
			pairs = append(pairs, k+"="+s.Labels.GetLabels()[k])
		}
		return "label " + strings.Join(pairs, ",")
	}
	return "what this version does not know"
}

func (a *app) caRevocationsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "revocations",
		Short: "List what is revoked, and who has not heard of it",
		Long: `List what is revoked, the oldest first. Those of a certificate or a removed host go by
themselves when nothing that is valid can match them any more.`,
		Example: `  symbolon ca revocations
  symbolon ca revocations -o json`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			resp, err := call(ctx, a, c.ListRevocations, &symbolonv1.ListRevocationsRequest{})
			if err != nil {
				return err
			}
			if behind := resp.GetHostsBehind(); len(behind) > 0 {
				a.warning("connected hosts that have not acknowledged all of it: %s", strings.Join(behind, ", "))
			}
			l := list{message: resp, empty: "nothing is revoked"}
			for _, r := range resp.GetRecords() {
				l.names = append(l.names, r.GetRevocation().GetId())
			}
			l.table = func(wide bool) *table {
				t := a.newTable(wide, "ID", "REVOKED", "REASON", "SINCE", "UNTIL", "|", "BY")
				for _, r := range resp.GetRecords() {
					until := "unrevoked"
					if r.GetExpires() != nil {
						until = absolute(a.Location, r.GetExpires())
					}
					t.row(text(r.GetRevocation().GetId()), text(revoked(r.GetRevocation())), text(r.GetReason()),
						text(ago(a.Now(), r.GetTime())), text(until), text(r.GetActor()))
				}
				return t
			}
			return a.printList(l)
		}),
	}
	a.outputFlag(cmd, listFormats...)
	return cmd
}

func (a *app) caUnrevokeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "unrevoke ID|SPIFFE-ID",
		Short: "End a revocation",
		Long: `End a revocation, by its id or by the SPIFFE ID that it names. New connections are
possible within moments; what was cut is for the applications to open again.`,
		Example: `  symbolon ca unrevoke 4be1c09a7d21
  symbolon ca unrevoke spiffe://acme.example/acme/prod/web`,
		Args: cobra.ExactArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			resp, err := call(ctx, a, c.Unrevoke, &symbolonv1.UnrevokeRequest{Id: args[0]})
			if err != nil {
				return err
			}
			a.say("not revoked any more: %s", revoked(resp.GetRecord().GetRevocation()))
			return nil
		}),
	}
}
