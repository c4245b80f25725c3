package netlab_test

import (
	"context"
	"fmt"
	"log"

	"github.com/symbolon/symbolon/internal/netlab"
)

// A client fetches a page through a router that translates addresses; the server
// sees the router. Tests use netlab.Test(t) in place of New, Close and Err.
func Example() {
	ctx := context.Background()
	w, err := netlab.New(netlab.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer w.Close()

	n := w.TwoHosts()
	n.Router.SNAT(n.RouterToServer)
	if err := w.Err(); err != nil {
		log.Fatal(err)
	}
	if _, err := n.Server.Nginx(ctx, netlab.Nginx{Port: 80, Body: "hello"}); err != nil {
		log.Fatal(err)
	}
	page, err := n.Client.Output(ctx, "curl", "-sSi", "http://10.2.0.2/")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(between(page, "X-Client-Address: ", "\r\n"))
	fmt.Println(between(page+"\n", "\r\n\r\n", "\n"))
	// Output:
	// 10.2.0.1
	// hello
}
