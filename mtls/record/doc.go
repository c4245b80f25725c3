// Package record is the data phase of a TLS 1.3 connection whose handshake
// crypto/tls has done: it takes over the TCP connection with the application
// traffic secrets and the record sequence numbers of both directions, and carries
// application data with few copies and system calls. On the wire nothing changes:
// the peer may be crypto/tls, OpenSSL, or this package.
//
//	keys := record.NewKeyLog(0)                 // one per tls.Config
//	config.KeyLogWriter = keys
//
//	tap := record.NewTap(tcp, keys)             // between crypto/tls and the socket
//	defer tap.Release()
//	c := tls.Client(tap, config)                // or tls.Server
//	err := c.HandshakeContext(ctx)
//	err = tap.Established(c.ConnectionState())
//	// c.Read and c.Write work as ever, until
//	conn, err := tap.Take(c)                    // ErrNoSecrets: go on with c
//
// A [Conn] is a [Reader] and a [Writer], which share nothing that one could wait
// for: one goroutine may read while another writes. Neither closes the connection,
// sets a deadline, or holds a buffer while it waits for bytes (on a connection with
// a file descriptor; any other is read into a buffer that is held meanwhile).
//
// # What is where
//
// Sections of RFC 8446 unless noted:
//
//	protection.go  5.2, 5.3  TLSCiphertext, per-record nonce, sequence numbers;
//	               7.1, 7.3  HKDF-Expand-Label "key" and "iv" (crypto/hkdf)
//	               7.2       the next generation of a secret, "traffic upd"
//	reader.go      5.1, 5.4  record types and lengths, padding, empty records;
//	               6, 6.1    alerts, close_notify, truncation
//	handshake.go   4.6       post-handshake messages: NewSessionTicket is passed over,
//	                         KeyUpdate obeyed, everything else refused
//	writer.go      5.5       the limit on a key's use, which forces a KeyUpdate;
//	               4.6.3     the answer to update_requested; 6.1 CloseWrite
//	receive.go, send.go      several records per readv(2), write(2) and writev(2)
//	keylog.go, tap.go        the way from crypto/tls to here
//
// # What a peer can and cannot do
//
// Not a byte is handed out before its record has been authenticated. A record that
// is too long, too short, of an unexpected type, replayed, reordered, cut or
// changed ends the connection with an alert and a [ProtocolError]; the end of the
// stream without close_notify is [ErrTruncated], never io.EOF. Records without
// application data are bounded in a row, handshake messages are never buffered, and
// a connection holds at most one buffer of 72 KiB a direction, whatever its peer
// sends or does not.
//
// Secrets are zeroed when a half ends; what crypto/aes and crypto/tls keep of them
// goes with the garbage collector. Go's FIPS 140 module wants to choose GCM's
// nonces itself, which this package does, so that it refuses to work in FIPS mode
// ([ErrFIPS]): crypto/tls goes on there.
package record
