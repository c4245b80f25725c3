package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) trustDomainCommand() *cobra.Command {
	return group("trust-domain", "Show the trust domains that are believed, and their bundles",
		`A TrustDomain in the root namespace ("symbolon policy apply") makes the workloads of another
trust domain known here: they are verified by its bundle, and may assert the claims that it
allows. The controller asks its endpoint for the bundle again and again; while that fails, the
last one stays in force.`,
		`  symbolon trust-domain list
  symbolon trust-domain show partner.example
  symbolon trust-domain refresh partner.example
  symbolon trust-domain bundle > acme.example.json`,
		a.trustDomainListCommand(), a.trustDomainShowCommand(), a.trustDomainRefreshCommand(), a.trustDomainBundleCommand())
}

func (a *app) trustDomains(ctx context.Context) (*symbolonv1.ListTrustDomainsResponse, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	return call(ctx, a, c.ListTrustDomains, &symbolonv1.ListTrustDomainsRequest{})
}

func (a *app) trustDomainListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the other trust domains",
		Long: `List the other trust domains: by which bundle they are verified, when their endpoint has
confirmed it last, and what is wrong if it does not.`,
		Example: `  symbolon trust-domain list -o wide`,
		Args:    cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error {
			resp, err := a.trustDomains(ctx)
			if err != nil {
				return err
			}
			l := list{message: resp, empty: "no other trust domain is known; apply a TrustDomain"}
			for _, t := range resp.GetTrustDomains() {
				l.names = append(l.names, t.GetName())
			}
			l.table = func(wide bool) *table {
				t := a.newTable(wide, "NAME", "BUNDLE", "CONFIRMED", "CLAIMS", "|", "ROOTS", "SEQUENCE", "ENDPOINT", "ERROR")
				for _, d := range resp.GetTrustDomains() {
					t.row(text(d.GetName()), bundleCell(d), text(a.confirmed(d)), text(strings.Join(d.GetClaims(), ",")),
						text(fmt.Sprint(d.GetRoots())), text(fmt.Sprint(d.GetSequence())), text(d.GetEndpoint()), text(d.GetError()))
				}
				return t
			}
			return a.printList(l)
		}),
	}
	a.outputFlag(cmd, listFormats...)
	return cmd
}

// bundleCell says in a word how a domain's bundle is.
func bundleCell(d *symbolonv1.TrustDomainStatus) cell {
	switch {
	case d.GetRoots() == 0:
		return no("none")
	case d.GetError() != "":
		return warn("not confirmed")
	case d.Fetched == nil && d.GetEndpoint() != "":
		return warn("not fetched yet")
	case d.Fetched == nil:
		return yes("given")
	}
	return yes("fetched")
}

func (a *app) confirmed(d *symbolonv1.TrustDomainStatus) string {
	if d.Fetched == nil {
		return "never"
	}
	return ago(a.Now(), d.GetFetched())
}

func (a *app) trustDomainShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show [NAME]",
		Short: "Show one trust domain; without a name, one's own",
		Long: `Show a trust domain: its endpoint, the bundle by which its workloads are verified, and how
fetching it goes. Without a name it is the controller's own, as others need it for their
TrustDomain: endpoint and endpoint_id.`,
		Example: `  symbolon trust-domain show
  symbolon trust-domain show partner.example`,
		Args: cobra.MaximumNArgs(1),
		RunE: a.run(a.trustDomainShow),
	}
	a.outputFlag(cmd, "table", "json", "yaml")
	return cmd
}

func (a *app) trustDomainShow(ctx context.Context, args []string) error {
	d, err := a.findTrustDomain(ctx, args)
	if err != nil {
		return err
	}
	switch a.output {
	case "json":
		return a.json(d)
	case "yaml":
		return a.yaml(d)
	}
	sequence := "none"
	if d.GetSequence() != 0 {
		sequence = fmt.Sprint(d.GetSequence())
	}
	lines := []pair{
		{"name", text(d.GetName())},
		{"endpoint", text(d.GetEndpoint())},
		{"profile", text(profileWord(d.GetProfile()))},
		{"endpoint id", text(d.GetEndpointId())},
		{"roots", text(fmt.Sprint(d.GetRoots()))},
		{"sequence", text(sequence)},
	}
	if d.GetRoots() > 0 {
		lines = append(lines, pair{"not after", text(absolute(a.Location, d.GetNotAfter()))})
	}
	if h := d.GetRefreshHint(); h != nil {
		lines = append(lines, pair{"refresh hint", text(h.AsDuration().String())})
	}
	if len(args) > 0 {
		lines = append(lines, pair{"claims", text(strings.Join(d.GetClaims(), ", "))}, pair{"bundle", bundleCell(d)},
			pair{"confirmed", text(a.confirmed(d))})
		if d.Changed != nil {
			lines = append(lines, pair{"changed", text(ago(a.Now(), d.GetChanged()))})
		}
	}
	if d.GetError() != "" {
		lines = append(lines, pair{"error", no(d.GetError())}, pair{"failing since", text(absolute(a.Location, d.GetFailingSince()))})
	}
	return a.pairs(lines...)
}

func profileWord(p symbolonv1.BundleEndpointProfile) string {
	switch p {
	case symbolonv1.BundleEndpointProfile_BUNDLE_ENDPOINT_PROFILE_HTTPS_SPIFFE:
		return "https_spiffe"
	case symbolonv1.BundleEndpointProfile_BUNDLE_ENDPOINT_PROFILE_HTTPS_WEB:
		return "https_web"
	}
	return ""
}

// findTrustDomain is the one that is named, or one's own.
func (a *app) findTrustDomain(ctx context.Context, args []string) (*symbolonv1.TrustDomainStatus, error) {
	resp, err := a.trustDomains(ctx)
	if err != nil {
		return nil, err
	}
	if len(args) == 0 || args[0] == resp.GetOwn().GetName() {
		return resp.GetOwn(), nil
	}
	for _, d := range resp.GetTrustDomains() {
		if d.GetName() == args[0] {
			return d, nil
		}
	}
	return nil, notFoundf("there is no TrustDomain %s", args[0])
}

func (a *app) trustDomainRefreshCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "refresh NAME",
		Short:   "Fetch a bundle now",
		Long:    `Have the controller ask a trust domain's endpoint for its bundle now, and wait for it.`,
		Example: `  symbolon trust-domain refresh partner.example`,
		Args:    cobra.ExactArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			resp, err := call(ctx, a, c.RefreshTrustDomain, &symbolonv1.RefreshTrustDomainRequest{Name: args[0]})
			if err != nil {
				return err
			}
			d := resp.GetTrustDomain()
			a.say("%s has %d roots, sequence %d; changed %s", d.GetName(), d.GetRoots(), d.GetSequence(), ago(a.Now(), d.GetChanged()))
			return nil
		}),
	}
}

func (a *app) trustDomainBundleCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "bundle [NAME]",
		Short: "Print a trust domain's SPIFFE bundle; without a name, one's own",
		Long: `Print a SPIFFE bundle (a JWK set). One's own is what others write under "bundle" in their
TrustDomain, or give to "spire-server federation create": it is public.`,
		Example: `  symbolon trust-domain bundle > acme.example.json`,
		Args:    cobra.MaximumNArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) error {
			d, err := a.findTrustDomain(ctx, args)
			if err != nil {
				return err
			}
			if d.GetBundle() == "" {
				return notFoundf("no bundle of %s is known", d.GetName())
			}
			return a.write([]byte(d.GetBundle() + "\n"))
		}),
	}
}
