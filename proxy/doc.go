// Package proxy is one connection's life: accept, identify, decide, tunnel,
// relay, record. It also holds the table of live connections, which is judged anew
// whenever policy or a certificate's validity changes, each distinct question once
// (live.go, group.go), and the session with the controller that brings those changes.
//
// outbound.go is the client's side, inbound.go the server's, local.go both ends on
// one host. Every connection that is accepted ends in exactly one record.
package proxy
