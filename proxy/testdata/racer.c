// racer opens connections as clients do that are hard to attribute. It forks one
// process for each, so that thousands cost little.
//
//	racer KIND COUNT PORT ADDRESS... [-- DECOY]
//	racer hold             what DECOY is executed as: waits for the end of descriptor 3
//	racer keep NAME        takes descriptors from the abstract socket NAME
//
// What each process does after connect:
//
//	stay   waits for the server's end
//	write  writes and exits
//	exit   exits
//	reset  resets (SO_LINGER 0) and exits
//	exec   executes DECOY
//	fork   leaves the socket to a child and exits
//	pass   sends the socket to the process that keeps DECOY, and exits
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { most = 64 }; // processes at a time

static void die(const char *what) {
	perror(what);
	_exit(1);
}

static void drain(int fd) {
	char b[64];
	while (read(fd, b, sizeof b) > 0) {}
}

static int dial(const char *address, int port) {
	struct sockaddr_in6 a6 = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	struct sockaddr_in a4 = {.sin_family = AF_INET, .sin_port = htons(port)};
	int v6 = inet_pton(AF_INET6, address, &a6.sin6_addr) == 1;
	if (!v6 && inet_pton(AF_INET, address, &a4.sin_addr) != 1) die(address);
	int fd = socket(v6 ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
	if (fd < 0) die("socket");
	struct sockaddr *a = v6 ? (struct sockaddr *)&a6 : (struct sockaddr *)&a4;
	if (connect(fd, a, v6 ? sizeof a6 : sizeof a4)) die("connect");
	return fd;
}

static socklen_t keeper(struct sockaddr_un *a, const char *name) {
	memset(a, 0, sizeof *a);
	a->sun_family = AF_UNIX;
	strncpy(a->sun_path + 1, name, sizeof a->sun_path - 2);
	return offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name);
}

union control {
	struct cmsghdr h;
	char space[CMSG_SPACE(sizeof(int))];
};

static void pass(int fd, const char *name) {
	struct sockaddr_un a;
	socklen_t len = keeper(&a, name);
	char byte = 0;
	struct iovec io = {&byte, 1};
	union control c = {.h = {.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
	memcpy(CMSG_DATA(&c.h), &fd, sizeof fd);
	struct msghdr m = {.msg_name = &a, .msg_namelen = len, .msg_iov = &io, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c};
	int s = socket(AF_UNIX, SOCK_DGRAM, 0);
	if (s < 0 || sendmsg(s, &m, 0) < 0) die("pass");
}

static void keep(const char *name) {
	struct sockaddr_un a;
	int s = socket(AF_UNIX, SOCK_DGRAM, 0), e = epoll_create1(0);
	if (s < 0 || e < 0 || bind(s, (struct sockaddr *)&a, keeper(&a, name))) die("keep");
	struct epoll_event ev = {.events = EPOLLIN, .data.fd = s};
	if (epoll_ctl(e, EPOLL_CTL_ADD, s, &ev)) die("epoll");
	if (write(1, "ready\n", 6) != 6) die("write");
	for (;;) {
		if (epoll_wait(e, &ev, 1, -1) != 1) continue;
		if (ev.data.fd != s) { // the server has ended it
			close(ev.data.fd);
			continue;
		}
		char byte;
		struct iovec io = {&byte, 1};
		union control c;
		struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c};
		if (recvmsg(s, &m, 0) < 0) die("recvmsg");
		struct cmsghdr *h = CMSG_FIRSTHDR(&m);
		if (!h || h->cmsg_type != SCM_RIGHTS) continue;
		memcpy(&ev.data.fd, CMSG_DATA(h), sizeof(int));
		ev.events = EPOLLIN;
		if (epoll_ctl(e, EPOLL_CTL_ADD, ev.data.fd, &ev)) die("epoll");
	}
}

static void race(const char *kind, int fd, const char *decoy) {
	if (!strcmp(kind, "stay")) {
		drain(fd);
	} else if (!strcmp(kind, "write")) {
		if (write(fd, "hello", 5) != 5) die("write");
	} else if (!strcmp(kind, "reset")) {
		struct linger l = {1, 0};
		if (setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l)) die("linger");
	} else if (!strcmp(kind, "exec")) {
		if (fd != 3) dup2(fd, 3);
		execl(decoy, decoy, "hold", (char *)0);
		die(decoy);
	} else if (!strcmp(kind, "fork")) {
		pid_t pid = fork();
		if (pid < 0) die("fork");
		if (pid == 0) drain(fd);
	} else if (!strcmp(kind, "pass")) {
		pass(fd, decoy);
	}
	_exit(0);
}

int main(int argc, char **argv) {
	if (argc == 2 && !strcmp(argv[1], "hold")) {
		drain(3);
		return 0;
	}
	if (argc == 3 && !strcmp(argv[1], "keep")) keep(argv[2]);
	if (argc < 5) return 2;
	const char *kind = argv[1], *decoy = "";
	int count = atoi(argv[2]), port = atoi(argv[3]), addresses = argc - 4, running = 0, status, failed = 0;
	if (addresses > 2 && !strcmp(argv[argc - 2], "--")) {
		decoy = argv[argc - 1];
		addresses -= 2;
	}
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	for (int i = 0; i < count || running > 0;) {
		if (i < count && running < most) {
			pid_t pid = fork();
			if (pid < 0) die("fork");
			if (pid == 0) race(kind, dial(argv[4 + i % addresses], port), decoy);
			i++, running++;
			continue;
		}
		pid_t pid = wait(&status);
		if (pid < 0) break; // ECHILD
		failed |= status;
		if (running > 0) running--;
	}
	while (wait(&status) > 0 || errno == EINTR) failed |= status; // the children of children
	return failed != 0;
}
