package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
)

func (a *app) hostCommand() *cobra.Command {
	return group("host", "Enrol, list and remove hosts",
		`A host is a machine with a proxy on it. It enrols once, with a join token that binds
it to a namespace and gives it labels; from then on it proves itself by its own
certificate.`,
		`  symbolon host token --namespace /acme/prod --label role=db > join.token
  symbolon host list`,
		a.hostListCommand(), a.hostShowCommand(), a.hostTokenCommand(), a.hostRemoveCommand())
}

func (a *app) hostListCommand() *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List enrolled hosts",
		Long: `List the enrolled hosts: whether each is connected, and which policy generation it has
in force. A host that refused a generation keeps its last good one; why it refused
is in "symbolon host show".`,
		Example: `  symbolon host list
  symbolon host list --namespace /acme/prod -o wide`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error { return a.hostList(ctx, namespace) }),
	}
	a.namespaceFlag(cmd, &namespace, "only hosts of this namespace and those below it")
	a.outputFlag(cmd, listFormats...)
	return cmd
}

func (a *app) hostList(ctx context.Context, namespace string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := a.hosts(ctx, c)
	if err != nil {
		return err
	}
	resp.Hosts = slices.DeleteFunc(resp.Hosts, func(h *symbolonv1.Host) bool { return !under(h.GetNamespace(), namespace) })
	l := list{message: resp, empty: "no hosts; enrol one with: symbolon host token --namespace PATH"}
	for _, h := range resp.GetHosts() {
		l.names = append(l.names, h.GetId())
	}
	l.table = func(wide bool) *table {
		t := a.newTable(wide, "ID", "HOSTNAME", "NAMESPACE", "STATE", "GENERATION", "LAST SEEN", "|",
			"VERSION", "ADDRESSES", "ENROLLED", "SVID EXPIRES", "ATTRIBUTES")
		for _, h := range resp.GetHosts() {
			seen := text(ago(a.Now(), h.GetLastSeen()))
			if wide {
				seen = text(absolute(a.Location, h.GetLastSeen()))
			}
			t.row(text(h.GetId()), text(h.GetHostname()), text(h.GetNamespace()), hostState(h),
				hostGeneration(h, resp.GetGeneration()), seen,
				text(h.GetVersion()), text(strings.Join(h.GetAddresses(), ",")),
				text(absolute(a.Location, h.GetEnrolled())), text(absolute(a.Location, h.GetSvidNotAfter())),
				text(attributes(h.GetAttributes())))
		}
		return t
	}
	return a.printList(l)
}

// hosts asks for all hosts, sorted by namespace, hostname and id.
func (a *app) hosts(ctx context.Context, c symbolonv1connect.AdminServiceClient) (*symbolonv1.ListHostsResponse, error) {
	resp, err := call(ctx, a, c.ListHosts, &symbolonv1.ListHostsRequest{})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(resp.Hosts, func(x, y *symbolonv1.Host) int {
		return cmp.Or(cmp.Compare(x.GetNamespace(), y.GetNamespace()), cmp.Compare(x.GetHostname(), y.GetHostname()),
			cmp.Compare(x.GetId(), y.GetId()))
	})
	return resp, nil
}

func hostState(h *symbolonv1.Host) cell {
	switch {
	case !h.GetConnected():
		return no("away")
	case h.GetError() != "":
		return warn("refused")
	default:
		return yes("connected")
	}
}

func hostGeneration(h *symbolonv1.Host, current uint64) cell {
	g := h.GetGeneration()
	if g >= current {
		return text(fmt.Sprint(g))
	}
	return cell{fmt.Sprintf("%d (%d behind)", g, current-g), yellow}
}

func (a *app) hostShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show ID|HOSTNAME",
		Short: "Show one host",
		Long: `Show one enrolled host: what it attested at enrolment, what it has in force, and why it
refused a policy generation, if it did. A hostname will do where it is unique.`,
		Example: `  symbolon host show web-1
  symbolon host show 7f3c9a10 -o json`,
		Args:              cobra.ExactArgs(1),
		RunE:              a.run(a.hostShow),
		ValidArgsFunction: a.completeHosts(),
	}
	a.outputFlag(cmd, "table", "json", "yaml")
	return cmd
}

func (a *app) hostShow(ctx context.Context, args []string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := a.hosts(ctx, c)
	if err != nil {
		return err
	}
	h, err := findHost(resp.GetHosts(), args[0])
	if err != nil {
		return err
	}
	switch a.output {
	case "json":
		return a.json(h)
	case "yaml":
		return a.yaml(h)
	}
	refusal := text("")
	if h.GetError() != "" {
		refusal = warn(h.GetError())
	}
	return a.pairs(
		pair{"id", text(h.GetId())},
		pair{"hostname", text(h.GetHostname())},
		pair{"namespace", text(h.GetNamespace())},
		pair{"state", hostState(h)},
		pair{"last seen", text(ago(a.Now(), h.GetLastSeen()))},
		pair{"generation", hostGeneration(h, resp.GetGeneration())},
		pair{"refused because", refusal},
		pair{"version", text(h.GetVersion())},
		pair{"addresses", text(strings.Join(h.GetAddresses(), " "))},
		pair{"attributes", text(attributes(h.GetAttributes()))},
		pair{"enrolled", text(absolute(a.Location, h.GetEnrolled()))},
		pair{"svid expires", text(ago(a.Now(), h.GetSvidNotAfter()))},
	)
}

// findHost takes an id, or a hostname that one host has.
func findHost(hosts []*symbolonv1.Host, name string) (*symbolonv1.Host, error) {
	var byName []*symbolonv1.Host
	for _, h := range hosts {
		if h.GetId() == name {
			return h, nil
		}
		if h.GetHostname() == name {
			byName = append(byName, h)
		}
	}
	switch len(byName) {
	case 0:
		return nil, notFoundf("no host %q", name)
	case 1:
		return byName[0], nil
	default:
		return nil, conflictf("%d hosts have the hostname %q: name one by its id", len(byName), name)
	}
}

func (a *app) hostTokenCommand() *cobra.Command {
	var (
		namespace string
		labelArgs []string
		ttl       time.Duration
	)
	cmd := &cobra.Command{
		Use:   "token --namespace PATH [--label KEY=VALUE]...",
		Short: "Make a join token for one host",
		Long: `Make a join token and print it on stdout, alone. It enrols one host, once, until it
expires; the host belongs to the namespace, and each label becomes its attribute
host.KEY. The token carries the hash of the controller's root key, which the proxy
checks before it sends the secret.

The token is a secret: put it into a file that only root can read.`,
		Example: `  (umask 077; symbolon host token --namespace /acme/prod --label role=db > join.token)
  symbolon host token -n /acme/dev --ttl 15m | ssh db-1 'umask 077; cat > /etc/symbolon/join.token'`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error { return a.hostToken(ctx, namespace, labelArgs, ttl) }),
	}
	a.namespaceFlag(cmd, &namespace, "the namespace that the host will belong to")
	cmd.Flags().StringArrayVar(&labelArgs, "label", nil, "KEY=VALUE: attribute host.KEY of the host (repeatable)")
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long the token can be used")
	return cmd
}

func (a *app) hostToken(ctx context.Context, namespace string, labelArgs []string, ttl time.Duration) error {
	if namespace == "" {
		return usagef("--namespace is needed: the namespace that the host will belong to")
	}
	if err := checkNamespace(namespace); err != nil {
		return err
	}
	if ttl <= 0 {
		return usagef("--ttl %s: want a positive duration such as 1h", ttl)
	}
	hostLabels := map[string]string{}
	for _, l := range labelArgs {
		k, v, ok := strings.Cut(l, "=")
		if !ok || k == "" || v == "" {
			return usagef("--label %q: want KEY=VALUE", l)
		}
		if _, twice := hostLabels[k]; twice {
			return usagef("--label %s is given twice", k)
		}
		hostLabels[k] = v
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := call(ctx, a, c.CreateJoinToken, &symbolonv1.CreateJoinTokenRequest{
		Namespace: namespace, Labels: hostLabels, Ttl: durationpb.New(ttl),
	})
	if err != nil {
		return err
	}
	if err := a.write([]byte(resp.GetToken() + "\n")); err != nil {
		return err
	}
	a.say("for one host in %s, until %s", namespace, absolute(a.Location, resp.GetExpires()))
	return nil
}

func (a *app) hostRemoveCommand() *cobra.Command {
	var readmit bool
	cmd := &cobra.Command{
		Use:   "remove ID|HOSTNAME",
		Short: "Remove a host",
		Long: `Remove a host: its session is cut, its own certificate and those of its workloads are
revoked and not renewed, and their connections are cut. To come back it needs a new join
token: the certificate or the cloud instance that it enrolled by does not let it in again,
unless --readmit says so.`,
		Example: `  symbolon host remove web-1
  symbolon host remove 7f3c9a10 --yes
  symbolon host remove 7f3c9a10 --readmit     # its instance lost its key, and enrols anew`,
		Args:              cobra.ExactArgs(1),
		RunE:              a.run(func(ctx context.Context, args []string) error { return a.hostRemove(ctx, args, readmit) }),
		ValidArgsFunction: a.completeHosts(),
	}
	cmd.Flags().BoolVar(&readmit, "readmit", false, "let its certificate or cloud instance enrol again, as a new host")
	a.yesFlag(cmd)
	return cmd
}

func (a *app) hostRemove(ctx context.Context, args []string, readmit bool) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := a.hosts(ctx, c)
	if err != nil {
		return err
	}
	h, err := findHost(resp.GetHosts(), args[0])
	if err != nil {
		return err
	}
	if err := a.confirm("remove host %s (%s, %s)", h.GetId(), h.GetHostname(), h.GetNamespace()); err != nil {
		return err
	}
	if _, err := call(ctx, a, c.RemoveHost, &symbolonv1.RemoveHostRequest{Id: h.GetId(), Readmit: readmit}); err != nil {
		return err
	}
	a.say("removed host %s (%s)", h.GetId(), h.GetHostname())
	return nil
}

func (a *app) completeHosts() cobra.CompletionFunc {
	return a.complete(func(ctx context.Context, c symbolonv1connect.AdminServiceClient) (names []string) {
		resp, err := a.hosts(ctx, c)
		if err != nil {
			return nil
		}
		for _, h := range resp.GetHosts() {
			names = append(names, h.GetId()+"\t"+h.GetHostname())
		}
		return names
	})
}

// under tells whether namespace is ancestor or below it; everything is below "".
func under(namespace, ancestor string) bool {
	return ancestor == "" || ancestor == "/" || namespace == ancestor || strings.HasPrefix(namespace, ancestor+"/")
}
