package netlab

// TwoHosts is the world most tests need:
//
//	client 10.1.0.2, fd00:1::2 -- 10.1.0.1, fd00:1::1 router 10.2.0.1, fd00:2::1 -- 10.2.0.2, fd00:2::2 server
//
// The router forwards and, unless told so with SNAT or DNAT, translates nothing.
type TwoHosts struct {
	Client, Router, Server *Host
	// RouterToClient and RouterToServer are the router's two interfaces.
	RouterToClient, RouterToServer *Interface
}

// TwoHosts makes the hosts "client", "router" and "server", linked and routed.
func (w *World) TwoHosts() *TwoHosts {
	w.reporter.Helper()
	t := &TwoHosts{Client: w.Host("client"), Router: w.Router("router"), Server: w.Host("server")}
	_, t.RouterToClient = w.Link(t.Client, t.Router,
		[]string{"10.1.0.2/24", "fd00:1::2/64"}, []string{"10.1.0.1/24", "fd00:1::1/64"})
	t.RouterToServer, _ = w.Link(t.Router, t.Server,
		[]string{"10.2.0.1/24", "fd00:2::1/64"}, []string{"10.2.0.2/24", "fd00:2::2/64"})
	t.Client.DefaultRoute("10.1.0.1")
	t.Client.DefaultRoute("fd00:1::1")
	t.Server.DefaultRoute("10.2.0.1")
	t.Server.DefaultRoute("fd00:2::1")
	return t
}
