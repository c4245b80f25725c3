package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/symbolon/symbolon/proxy"
)

var debugPages = []string{"connections", "policies", "identities", "rules", "status"}

func debugCommand() *cobra.Command {
	socket := proxy.DefaultConfig().Socket
	var from, to, port string
	c := &cobra.Command{
		Use:   "debug {" + strings.Join(debugPages, "|") + "}",
		Short: "Show what the running proxy knows, with or without a controller",
		Long: `Asks the proxy on this host, over its Unix socket, and prints JSON:

  connections   live ones, with both identities, policies, protection and bytes
  policies      the generation in force, as YAML documents, and what the names of Externals
                and Services resolve to; with --from, --to and --port what it says of a
                connection, and why (as 'symbolon explain', without the controller)
  identities    the workloads seen, with their SPIFFE IDs and claims
  rules         what is in the kernel, and how it differs from what should be
  status        host, controller, generation, revocations, bundles, certificate; since when
                each is as it is (after a restart too), and when the first SVID ends; what
                keeps tunnel.fast_open from its effect; which container runtimes answer`,
		Example: `  symbolon-proxy debug connections | jq '.[].source.spiffe_id'
  symbolon-proxy debug policies --from app=web@/acme/prod --to api.pay.example.com --port 443`,
		Args:      arguments(cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs)),
		ValidArgs: debugPages,
		RunE: func(cmd *cobra.Command, args []string) error {
			page := args[0]
			if from != "" || to != "" || port != "" {
				if page != "policies" || from == "" || to == "" || port == "" {
					return errors.New("--from, --to and --port go together, with policies")
				}
				page = "explain?" + url.Values{"from": {from}, "to": {to}, "port": {port}}.Encode()
			}
			return debugPage(cmd.Context(), socket, page, cmd.OutOrStdout())
		},
	}
	c.Flags().StringVar(&socket, "socket", socket, "the proxy's socket")
	c.Flags().StringVar(&from, "from", "", "explain: the client, a SPIFFE ID of this host, key=value,...@/namespace or an address")
	c.Flags().StringVar(&to, "to", "", "explain: the server, likewise, or a DNS name")
	c.Flags().StringVar(&port, "port", "", "explain: the server's port, such as 443 or tcp/443")
	return c
}

func debugPage(ctx context.Context, socket, page string, out io.Writer) error {
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://proxy/debug/"+page, nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED): // refused: it was killed
		return fmt.Errorf("no proxy runs here with the socket %s; start it, or name its socket with --socket", socket)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s is for root only: %w", socket, os.ErrPermission)
	case err != nil:
		return err
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusBadRequest {
		why, _ := io.ReadAll(io.LimitReader(res.Body, 4096))
		return errors.New(strings.TrimSpace(string(why)))
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the proxy answered %s", res.Status)
	}
	_, err = io.Copy(out, res.Body)
	return err
}
