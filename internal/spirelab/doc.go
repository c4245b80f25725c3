// Package spirelab runs a real SPIRE in a netlab world: servers, each with a trust
// domain of its own, agents on the hosts, entries, and federation between the servers.
//
//	east, err := spirelab.StartServer(ctx, host, spirelab.ServerConfig{TrustDomain: "east.example", Address: "10.8.1.2"})
//	agent, err := east.Agent(ctx, client, spirelab.AgentConfig{Delegates: []string{"/symbolon/proxy"}})
//	id, err := agent.Entry(ctx, spirelab.Entry{Path: "/curl", Selectors: []string{"unix:path:/usr/bin/curl"}})
//
// The programs are those that 'make spire' builds (hack/spire.sh); [Test] skips a test
// where they are not, and fails it where they were asked for by SYMBOLON_SPIRE.
//
// Everything that they write, the keys of SPIRE's disk KeyManager above all, is in the
// world's directory in memory ([netlab.World.MemoryDir]); their logs are with those of
// the world's other daemons. New and changed entries reach the agents within two to
// three seconds (SPIRE's default is ten), so wait for what they bring about.
package spirelab
