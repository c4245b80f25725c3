package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/symbolon/symbolon/proxy"
)

var debugPages = []string{"connections", "policies", "identities", "rules", "status"}

func debugCommand() *cobra.Command {
	socket := proxy.DefaultConfig().Socket
	c := &cobra.Command{
		Use:   "debug {" + strings.Join(debugPages, "|") + "}",
		Short: "Show what the running proxy knows, with or without a controller",
		Long: `Asks the proxy on this host, over its Unix socket, and prints JSON:

  connections   live ones, with both identities, policies, protection and bytes
  policies      the generation in force, as YAML documents
  identities    the workloads seen, with their SPIFFE IDs and claims
  rules         what is in the kernel, and how it differs from what should be
  status        host, controller, generation, certificate`,
		Example:   "  symbolon-proxy debug connections | jq '.[].source.spiffe_id'",
		Args:      arguments(cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs)),
		ValidArgs: debugPages,
		RunE: func(cmd *cobra.Command, args []string) error {
			return debugPage(cmd.Context(), socket, args[0], cmd.OutOrStdout())
		},
	}
	c.Flags().StringVar(&socket, "socket", socket, "the proxy's socket")
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
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the proxy answered %s", res.Status)
	}
	_, err = io.Copy(out, res.Body)
	return err
}
