package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// The peers' names in their certificates.
const (
	clientName = "client.bench"
	serverName = "server.bench"
)

// certificates are the files that the peers read: P-256, one CA, a leaf for each side.
// The keys are throw-away ones of this run; the lab's directory goes with it. What
// Symbolon's proxies use comes from their controller and is on no disk.
type certificates struct {
	CA                    string
	ClientCert, ClientKey string
	ServerCert, ServerKey string
	// ClientPair and ServerPair hold certificate and key in one file.
	ClientPair, ServerPair string
}

func newCertificates(dir string) (*certificates, error) {
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return nil, err
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	c := &certificates{
		CA:         at("ca.pem"),
		ClientCert: at("client.crt"), ClientKey: at("client.key"), ClientPair: at("client.pem"),
		ServerCert: at("server.crt"), ServerKey: at("server.key"), ServerPair: at("server.pem"),
	}
	if err := os.WriteFile(c.CA, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		return nil, err
	}
	if err := writeLeaf(ca, caKey, clientName, x509.ExtKeyUsageClientAuth, c.ClientCert, c.ClientKey, c.ClientPair); err != nil {
		return nil, err
	}
	return c, writeLeaf(ca, caKey, serverName, x509.ExtKeyUsageServerAuth, c.ServerCert, c.ServerKey, c.ServerPair)
}

func writeLeaf(ca *x509.Certificate, caKey *ecdsa.PrivateKey, name string, usage x509.ExtKeyUsage, certFile, keyFile, pairFile string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	leaf := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	if err != nil {
		return err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	private := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	for file, data := range map[string][]byte{certFile: cert, keyFile: private, pairFile: append(append([]byte{}, cert...), private...)} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			return err
		}
	}
	return nil
}
