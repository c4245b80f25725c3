// Package cloud asks a cloud's metadata service what machine this is, for somebody else
// to believe: it fetches the instance identity document that the cloud has signed.
//
//	c := cloud.Client{Dialer: redirect.Dialer(redirect.MarkControl, redirect.DefaultKeepAlive)}
//	document, err := c.Fetch(ctx, cloud.GCP, cloud.Challenge{Audience: "...", Nonce: "..."})
//
// What it returns is as good as the network that it came over, until somebody has
// verified the signature (controller/instance does). Nothing else that the service says
// is read: tags, user data and the like are not signed.
//
// The service is at 169.254.169.254, over plain HTTP. A fetch is bounded in time and in
// size, follows no redirect, and takes nothing from the environment's proxy settings.
package cloud
