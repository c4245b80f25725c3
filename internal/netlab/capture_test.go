package netlab_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
)

// sink reads connections to their end.
func sink(t *testing.T, h *netlab.Host, address string) {
	t.Helper()
	ln, err := h.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, conn) // a reset is as good an end as any
			conn.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
}

func TestCaptureSeesWhatPassed(t *testing.T) {
	w := netlab.Test(t, "tcpdump", "tshark")
	n := w.TwoHosts()
	sink(t, n.Server, ":7")
	for _, tt := range []struct{ iface, filter, server string }{
		{"eth0", "", "10.2.0.2:7"},
		{"eth0", "tcp port 7", "[fd00:2::2]:7"},
		{"any", "", "10.2.0.2:7"},
		{"any", "tcp port 7", "[fd00:2::2]:7"},
	} {
		t.Run(tt.iface+" "+tt.filter+" "+tt.server, func(t *testing.T) {
			c, err := n.Router.Capture(tt.iface, tt.filter)
			if err != nil {
				t.Fatal(err)
			}
			whole, split := []byte("marker in one packet"), []byte("marker over two packets")
			conn, err := n.Client.Dial(t.Context(), "tcp", tt.server)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			for _, b := range [][]byte{whole, split[:11], split[11:]} {
				if _, err := conn.Write(b); err != nil {
					t.Fatal(err)
				}
				// Looking at the capture amid the connection also keeps the writes apart.
				if _, err := c.Packets(); err != nil {
					t.Fatal(err)
				}
			}
			if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Fatalf("read %v, want EOF", err)
			}
			if _, err := c.Stop(); err != nil {
				t.Fatal(err)
			}
			for marker, want := range map[string]bool{
				string(whole):       true,
				string(split):       true,
				"marker never sent": false,
				"packetmarker":      true, // the stream has no seam between the writes
				"packets" + "whole": false,
			} {
				got, err := c.Contains([]byte(marker))
				if err != nil {
					t.Fatal(err)
				}
				if got != want {
					t.Errorf("Contains(%q) is %v, want %v", marker, got, want)
				}
			}
			streams, err := c.Streams()
			if err != nil {
				t.Fatal(err)
			}
			if len(streams) != 1 || !bytes.Equal(streams[0].Data, append(whole, split...)) || streams[0].Dst.String() != tt.server {
				t.Errorf("streams %+v", streams)
			}
			if packets, err := c.Packets(); err != nil || packets < 6 {
				t.Errorf("%d packets, %v", packets, err)
			}
			rows, err := c.Tshark(t.Context(), "tcp.flags.syn == 1 && tcp.flags.ack == 0", "tcp.dstport", "frame.number")
			if err != nil {
				t.Fatal(err)
			}
			if len(rows) == 0 || len(rows[0]) != 2 || rows[0][0] != "7" {
				t.Errorf("tshark found %v", rows)
			}
		})
	}
}

func TestCaptureFailsLoudly(t *testing.T) {
	w := netlab.Test(t, "tcpdump")
	h := w.Host("a")
	if _, err := h.Capture("eth7", ""); err == nil || !strings.Contains(err.Error(), "eth7") {
		t.Errorf("capture of a missing interface: %v", err)
	}
	if _, err := h.Capture("lo", "no such filter"); err == nil || !strings.Contains(err.Error(), "syntax error") {
		t.Errorf("capture with a bad filter: %v", err)
	}
}
