package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"github.com/symbolon/symbolon/internal/netlab"
)

// absent is what nobody on the path may read: payload, identities, attributes.
func (d *demo) absent() []string {
	return []string{d.secret, "TOP-SECRET", "SELECT", "payroll", "HTTP/1.1", "spiffe://", "app=web", "report-reads-web", "/acme/prod"}
}

// wire shows what somebody on the path saw of steps 2 to 5.
func (d *demo) wire(ctx context.Context) error {
	d.heading("On the wire", "tcpdump recorded all of it since before the hosts joined, at two places. This is nginx's\nlast answer, as it passed the NAT:")
	var answers [][]byte
	var counts []string
	for _, c := range d.captures {
		t, connections, err := onlyTLS(c)
		if err != nil {
			return err
		}
		packets, err := c.Packets()
		if err != nil {
			return err
		}
		answers = append(answers, t.carrying(frameLength+int(d.balancedFlow.BytesReceived)))
		counts = append(counts, fmt.Sprintf("%s: %s, every byte in a TLS record: %d records, %d of them encrypted (%d packets in all)",
			c.where, plural(connections, "application connection"), t.records, len(t.encrypted), packets))
	}
	d.output(dump(answers[0], dumpLines))
	if err := d.claim(answers[0] != nil && bytes.Equal(answers[0], answers[1]),
		fmt.Sprintf("nginx's %d bytes are in a TLS record of %d; HAProxy forwarded that very record", d.balancedFlow.BytesReceived, len(answers[0])), answers); err != nil {
		return err
	}
	for i, c := range d.captures {
		if err := d.claim(true, counts[i], nil); err != nil {
			return err
		}
		if err := d.dissect(ctx, c); err != nil {
			return err
		}
	}
	if err := d.search(); err != nil {
		return err
	}
	d.meaning("Whoever listens learns addresses, ports, sizes and times. Neither data, nor names, nor labels.")
	return nil
}

// search looks for what must not be there.
func (d *demo) search() error {
	for _, text := range d.absent() {
		for _, c := range d.captures {
			found, err := c.Contains([]byte(text))
			if err != nil {
				return err
			}
			if found {
				return d.claim(false, fmt.Sprintf("%q is not on the wire %s", text, c.where), "it is, in "+c.Path())
			}
		}
	}
	return d.claim(true, "searched for and found nowhere: "+strings.Join(d.absent(), ", "), nil)
}

// onlyTLS counts the TLS records of the applications' connections. It is an error
// if there is anything else in them.
func onlyTLS(c *tap) (all tally, connections int, err error) {
	streams, err := c.Streams()
	if err != nil {
		return all, 0, err
	}
	for _, s := range streams {
		if !application(s.Src.Port()) && !application(s.Dst.Port()) {
			continue
		}
		t, err := tallyRecords(s.Data)
		if err != nil {
			return all, 0, &claimError{"every byte is in a TLS record", fmt.Sprintf("%s, %s to %s: %v", c.where, s.Src, s.Dst, err)}
		}
		all.records += t.records
		all.encrypted = append(all.encrypted, t.encrypted...)
		if application(s.Dst.Port()) {
			connections++
		}
	}
	if connections == 0 {
		return all, 0, &claimError{"the applications' connections were recorded", c.where + ": none"}
	}
	return all, connections, nil
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func application(port uint16) bool { return port == webPort || port == dbPort }

// dissect asks tshark, which knows nothing of us, what was agreed in the handshakes.
func (d *demo) dissect(ctx context.Context, c *tap) error {
	path, err := netlab.Tool("tshark")
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, path, "-n", "-r", c.Path(),
		"-d", fmt.Sprintf("tcp.port==%d,tls", webPort), "-d", fmt.Sprintf("tcp.port==%d,tls", dbPort),
		"-Y", fmt.Sprintf("tls.handshake.type == 2 && tcp.port in {%d, %d}", webPort, dbPort), // ServerHello
		"-T", "fields", "-E", "separator=/s",
		"-e", "tls.handshake.extensions.supported_version", "-e", "tls.handshake.ciphersuite", "-e", "tls.handshake.extensions_key_share_group",
	).Output()
	if err != nil {
		return fmt.Errorf("tshark: %w", err)
	}
	hellos := strings.Split(strings.TrimSpace(string(out)), "\n")
	// TLS 1.3, TLS_AES_256_GCM_SHA384, X25519MLKEM768 (IANA's numbers).
	const agreed = "0x0304 0x1302 4588"
	holds := !slices.ContainsFunc(hellos, func(h string) bool { return h != agreed })
	return d.claim(holds, fmt.Sprintf("tshark agrees: %s, TLS 1.3 with AES-256-GCM and X25519MLKEM768", plural(len(hellos), "handshake")), hellos)
}
