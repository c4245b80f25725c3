package record

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// vectors reads testdata of lines "name hex".
func vectors(t *testing.T, file string) map[string][]byte {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	v := make(map[string][]byte)
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			if v[name], err = hex.DecodeString(value); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	return v
}

func TestRFC8448TrafficKeys(t *testing.T) {
	v := vectors(t, "testdata/rfc8448-section3.txt")
	s := suites[tls.TLS_AES_128_GCM_SHA256]
	for _, side := range []string{"client", "server"} {
		key, err := s.expandLabel(v[side+"_secret"], "key", s.keySize)
		if err != nil {
			t.Fatal(err)
		}
		iv, err := s.expandLabel(v[side+"_secret"], "iv", ivSize)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(v[side+"_key"], key); diff != "" {
			t.Errorf("%s key (-want +got):\n%s", side, diff)
		}
		if diff := cmp.Diff(v[side+"_iv"], iv); diff != "" {
			t.Errorf("%s iv (-want +got):\n%s", side, diff)
		}
	}
}

func TestRFC8448RecordsWritten(t *testing.T) {
	v := vectors(t, "testdata/rfc8448-section3.txt")
	for _, side := range []struct {
		name     string
		sequence uint64 // the server has sent its ticket
	}{{"client", 0}, {"server", 1}} {
		t.Run(side.name, func(t *testing.T) {
			var out bytes.Buffer
			w, err := NewWriter(&out, Config{
				Suite: tls.TLS_AES_128_GCM_SHA256, WriteSecret: v[side.name+"_secret"], WriteSequence: side.sequence,
			})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(v["payload"]); err != nil {
				t.Fatal(err)
			}
			if err := w.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			want := append(bytes.Clone(v[side.name+"_data_record"]), v[side.name+"_alert_record"]...)
			if diff := cmp.Diff(want, out.Bytes()); diff != "" {
				t.Errorf("records (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("ticket", func(t *testing.T) {
		p, err := newProtection(tls.TLS_AES_128_GCM_SHA256, v["server_secret"], 0)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(v["server_ticket_record"], sealed(t, p, typeHandshake, v["ticket"], 0)); diff != "" {
			t.Errorf("record (-want +got):\n%s", diff)
		}
	})
}

func TestRFC8448RecordsRead(t *testing.T) {
	v := vectors(t, "testdata/rfc8448-section3.txt")
	fromServer := bytes.Join([][]byte{v["server_ticket_record"], v["server_data_record"], v["server_alert_record"]}, nil)
	fromClient := bytes.Join([][]byte{v["client_data_record"], v["client_alert_record"]}, nil)
	for name, test := range map[string]struct {
		stream []byte
		secret string
		client bool
	}{
		"client": {fromServer, "server_secret", true},
		"server": {fromClient, "client_secret", false},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := New(&memory{in: bytes.NewReader(test.stream)}, Config{
				Client: test.client, Suite: tls.TLS_AES_128_GCM_SHA256,
				ReadSecret: v[test.secret], WriteSecret: v["client_secret"],
			})
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(c.Reader)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(v["payload"], got); diff != "" {
				t.Errorf("payload (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("ticket to a server", func(t *testing.T) {
		c, err := New(&memory{in: bytes.NewReader(fromServer)}, Config{
			Suite: tls.TLS_AES_128_GCM_SHA256, ReadSecret: v["server_secret"], WriteSecret: v["client_secret"],
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Next()
		var p *ProtocolError
		if !errors.As(err, &p) || p.Alert != AlertUnexpectedMessage {
			t.Errorf("error %v, want unexpected_message", err)
		}
	})
}
