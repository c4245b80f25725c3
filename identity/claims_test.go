package identity

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The format is a promise to every other version: these bytes do not change.
const goldenClaims = "302e" + // SEQUENCE
	"020101" + // version 1
	"3029" + // SEQUENCE OF
	"300a" + "0c03" + "617070" + "0c03" + "617069" + // app=api
	"300b" + "0c03" + "656e76" + "0c04" + "70726f64" + // env=prod
	"300e" + "0c09" + "686f73742e726f6c65" + "0c01" + "64" // host.role=d

func TestClaimsGoldenBytes(t *testing.T) {
	claims := NewAttributes(map[string][]string{"host.role": {"d"}, "env": {"prod"}, "app": {"api"}})
	ext, err := MarshalClaims(claims)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(ext.Value); got != goldenClaims {
		t.Errorf("encoded\n%s, want\n%s", got, goldenClaims)
	}
	if ext.Critical {
		t.Error("the extension is critical: other SPIFFE software would refuse the certificate")
	}
	if got := ext.Id.String(); got != "2.25.1165296520" {
		t.Errorf("OID %s", got)
	}
	got, err := parseClaims(ext.Value)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(claims, got); d != "" {
		t.Errorf("read back (-want +got):\n%s", d)
	}
}

// der is one TLV with a short or two-byte length.
func der(tag byte, parts ...[]byte) []byte {
	body := bytes.Join(parts, nil)
	switch n := len(body); {
	case n < 0x80:
		return append([]byte{tag, byte(n)}, body...)
	case n < 0x100:
		return append([]byte{tag, 0x81, byte(n)}, body...)
	default:
		return append([]byte{tag, 0x82, byte(n >> 8), byte(n)}, body...)
	}
}

func derClaim(k, v string) []byte { return der(0x30, der(0x0c, []byte(k)), der(0x0c, []byte(v))) }

func derClaims(version byte, claims ...[]byte) []byte {
	return der(0x30, der(0x02, []byte{version}), der(0x30, claims...))
}

func TestClaimsRefused(t *testing.T) {
	many := func(n int) (out [][]byte) {
		for i := range n {
			out = append(out, derClaim(fmt.Sprintf("k%03d", i), "v"))
		}
		return out
	}
	if got, err := parseClaims(derClaims(1, many(MaxClaims)...)); err != nil || len(got) != MaxClaims {
		t.Fatalf("the largest number of claims: %d, %v", len(got), err)
	}
	for name, in := range map[string][]byte{
		"empty":                    {},
		"no version":               der(0x30, der(0x30)),
		"version 0":                derClaims(0),
		"version 2":                derClaims(2, derClaim("app", "api")),
		"long version":             der(0x30, der(0x02, []byte{0, 1}), der(0x30)),
		"huge version":             der(0x30, der(0x02, bytes.Repeat([]byte{1}, 9)), der(0x30)),
		"no list":                  der(0x30, der(0x02, []byte{1})),
		"unsorted keys":            derClaims(1, derClaim("env", "prod"), derClaim("app", "api")),
		"unsorted values":          derClaims(1, derClaim("app", "b"), derClaim("app", "a")),
		"duplicate":                derClaims(1, derClaim("app", "api"), derClaim("app", "api")),
		"trailing bytes":           append(derClaims(1, derClaim("app", "api")), 0),
		"trailing in body":         der(0x30, der(0x02, []byte{1}), der(0x30), der(0x05)),
		"trailing in claim":        derClaims(1, der(0x30, der(0x0c, []byte("a")), der(0x0c), der(0x0c))),
		"value missing":            derClaims(1, der(0x30, der(0x0c, []byte("a")))),
		"printable string":         derClaims(1, der(0x30, der(0x13, []byte("a")), der(0x0c, []byte("b")))),
		"empty key":                derClaims(1, derClaim("", "x")),
		"key not UTF-8":            derClaims(1, derClaim("a\xff", "x")),
		"value not UTF-8":          derClaims(1, derClaim("a", "\xc0\x80")),
		"cut short":                derClaims(1, derClaim("app", "api"))[:10],
		"length not minimal":       {0x30, 0x81, 0x05, 0x02, 0x01, 0x01, 0x30, 0x00},
		"indefinite length":        {0x30, 0x80, 0x02, 0x01, 0x01, 0x30, 0x00, 0x00, 0x00},
		"too many":                 derClaims(1, many(MaxClaims+1)...),
		"too large":                derClaims(1, derClaim("a", strings.Repeat("x", MaxClaimsSize))),
		"a set instead":            der(0x31, der(0x02, []byte{1}), der(0x30)),
		"length beyond the buffer": {0x30, 0x84, 0xff, 0xff, 0xff, 0xff},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := parseClaims(in); !errors.Is(err, ErrMalformedClaims) {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
}

func TestClaimsOfCertificate(t *testing.T) {
	good := pkix.Extension{Id: ClaimsOID, Value: derClaims(1, derClaim("app", "api"))}
	critical := good
	critical.Critical = true
	other := pkix.Extension{Id: asn1.ObjectIdentifier{2, 25, 7}, Value: []byte("x")}
	for _, tt := range []struct {
		name string
		ext  []pkix.Extension
		want Attributes
		err  error
	}{
		{"absent", []pkix.Extension{other}, nil, nil},
		{"one", []pkix.Extension{other, good}, Attributes{{"app", "api"}}, nil},
		{"none in it", []pkix.Extension{{Id: ClaimsOID, Value: derClaims(1)}}, nil, nil},
		{"twice", []pkix.Extension{good, other, good}, nil, ErrMalformedClaims},
		{"critical", []pkix.Extension{critical}, nil, ErrMalformedClaims},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ClaimsOf(&x509.Certificate{Extensions: tt.ext})
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

func TestMarshalClaimsRefusesWhatCannotBeRead(t *testing.T) {
	many := Attributes{}
	for i := range MaxClaims + 1 {
		many = append(many, Attribute{"k", fmt.Sprint(i)})
	}
	for name, claims := range map[string]Attributes{
		"too many":  many,
		"too large": {{"k", strings.Repeat("x", MaxClaimsSize)}},
		"empty key": {{"", "v"}},
		"not UTF-8": {{"k", "\xff"}},
	} {
		if _, err := MarshalClaims(claims); !errors.Is(err, ErrMalformedClaims) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A literal in any order is still the canonical form on the wire.
	ext, err := MarshalClaims(Attributes{{"b", "2"}, {"a", "1"}, {"b", "2"}})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := parseClaims(ext.Value); err != nil || len(got) != 2 {
		t.Errorf("read back %v, %v", got, err)
	}
}

// What the decoder takes has one encoding, and it never panics.
func FuzzParseClaims(f *testing.F) {
	golden, err := hex.DecodeString(goldenClaims)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(golden)
	f.Add(derClaims(1))
	f.Add(derClaims(2, derClaim("app", "api")))
	f.Add(derClaims(1, derClaim("app", "b"), derClaim("app", "a")))
	f.Add([]byte{0x30, 0x84, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, in []byte) {
		claims, err := parseClaims(in)
		if err != nil {
			if !errors.Is(err, ErrMalformedClaims) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		ext, err := MarshalClaims(claims)
		if err != nil {
			t.Fatalf("read, but cannot be written: %v", err)
		}
		if !bytes.Equal(ext.Value, in) {
			t.Fatalf("two encodings of %v:\n%x\n%x", claims, in, ext.Value)
		}
	})
}
