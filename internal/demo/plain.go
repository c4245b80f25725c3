package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/symbolon/symbolon/internal/netlab"
)

const dumpLines = 6 // of 16 bytes

// query is the analyst's.
const query = "SELECT name, note FROM payroll"

func curl(url string) []string { return []string{"curl", "-sS", "--max-time", "10", url} }

func psql(sql string) []string {
	return []string{"psql", "-h", serverAddr, "-U", "postgres", "-Atc", sql}
}

var (
	directURL   = "http://" + serverAddr + "/"
	balancedURL = "http://" + balancerAddr + "/"
)

// plain shows the world as it is without Symbolon.
func (d *demo) plain(ctx context.Context) error {
	d.heading("Without Symbolon", "curl fetches a page and psql asks the database, while tcpdump listens on the NAT's\noutside.")
	capture, err := d.nat.Capture(d.natOut.Name, "")
	if err != nil {
		return err
	}
	if err := d.fetch(ctx, directURL); err != nil {
		return err
	}
	if err := d.ask(ctx); err != nil {
		return err
	}
	if _, err := capture.Stop(); err != nil {
		return err
	}
	streams, err := capture.Streams()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(streams, func(s netlab.Stream) bool {
		return s.Src.Port() == webPort && strings.Contains(string(s.Data), d.secret)
	})
	if i < 0 {
		return errors.New("the capture has no answer of the web server")
	}
	d.plainPage = streams[i].Data
	d.say(fmt.Sprintf("\nOn the wire, the end of nginx's answer (%d bytes in all):", len(d.plainPage)))
	d.output(dump(tail(d.plainPage, 16*dumpLines), dumpLines))
	for _, text := range []string{d.secret, "SELECT"} {
		found, err := capture.Contains([]byte(text))
		if err != nil {
			return err
		}
		if err := d.claim(found, fmt.Sprintf("%q is in the capture, in the clear", text), "not found"); err != nil {
			return err
		}
	}
	d.meaning("Everybody on the path reads along, and all that the server knows of the client is an address: the NAT's.")
	return nil
}

// fetch gets the page with the secret.
func (d *demo) fetch(ctx context.Context, url string) error {
	r, err := d.run(ctx, d.client, "", curl(url)...)
	if err != nil {
		return err
	}
	return d.claim(r.ExitCode == 0 && strings.Contains(r.Stdout, d.secret), "curl has the page", r)
}

// ask queries the database for the secret.
func (d *demo) ask(ctx context.Context) error {
	r, err := d.run(ctx, d.client, "", psql(query)...)
	if err != nil {
		return err
	}
	return d.claim(r.ExitCode == 0 && strings.Contains(r.Stdout, d.secret), "psql has its answer", r)
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }
