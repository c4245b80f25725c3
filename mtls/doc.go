// Package mtls is the tunnel between two proxies: protocol symbolon/1 on TLS 1.3
// over TCP, to the application's own destination address and port.
//
//	client                                     server
//	ClientHello (ALPN symbolon/1)  ────────▶
//	                               ◀────────   ServerHello … Certificate … Finished
//	Certificate … Finished, Open   ────────▶
//	                               ◀────────   Verdict
//	application bytes              ◀───────▶   application bytes
//
// Both sides present an X.509-SVID; both are judged by VerifyConnection, which
// also runs on resumption, where crypto/tls skips VerifyPeerCertificate. A finished
// handshake authorizes nothing: a TLS 1.3 client hears of a refused certificate
// only later, so nothing counts as open before the Verdict.
//
// Open and Verdict are protobuf messages (api/symbolon/v1/tunnel.proto) behind a
// 4-byte big-endian length, at most MaxMessage bytes. After the Verdict the stream
// carries the application's bytes, in one of two ways:
//
//   - encrypted: they stay in TLS. A direction ends by close_notify; an end of the
//     TCP stream without it is ErrTruncated, never io.EOF.
//     Where Open asks for frames, an empty one ends a direction instead, so that the
//     tunnel can serve again; and between them Control messages may stand, by which
//     each side shows the certificate that has followed the handshake's (Renewal).
//   - authenticated: they are raw TCP, which the kernel can splice. The client's first
//     ones can be in the Open, which saves a round trip; the Verdict says how many the
//     server has taken.
//
// The server's side finds tunnels among other connections with Peek, which leaves
// every byte in the kernel.
package mtls
