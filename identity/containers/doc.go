// Package containers asks the container runtimes of this host what they run: which image
// a container was made from, what it is called, which pod it belongs to.
//
//	c := containers.New(containers.Options{Sockets: sockets, Changed: func() { manager.Refresh(resolver.Refresh) }})
//	defer c.Close()
//	resolver.SetContainers(c)
//
// Which container a process is in is the kernel's word: its cgroup. The runtime is asked
// for that container's full id, and believed if the process that it names as the
// container's is in the same cgroup, and if the socket is root's. So a runtime in another
// place, or a cgroup that is only called like another container's, gives nobody that one's
// image.
//
// Nothing is asked that changes anything. Every question has a deadline, every answer a
// bound. While a runtime does not answer, its containers have none of these attributes;
// those that have been answered for keep theirs.
package containers
