#!/bin/bash
# Installs the programs that `make demo` and `make test` use: real servers, real
# balancers, real captures. Only what is missing, from the distribution (Debian,
# Ubuntu), and none of it is started as a service. "deps.sh bench" adds what only
# `make bench` uses.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

# What is looked for: what provides it. A program counts however it came here.
# internal/netlab/deps_test.go holds that no test needs another.
declare -A package=(
	[iptables]=iptables [ip6tables]=iptables [iptables-restore]=iptables [ip6tables-restore]=iptables
	[ipset]=ipset [conntrack]=conntrack [ip]=iproute2 [ss]=iproute2 [tc]=iproute2
	[nsenter]=util-linux [unshare]=util-linux [mount]=mount [ps]=procps [tcpdump]=tcpdump [tshark]=tshark
	[nginx]=nginx-light [haproxy]=haproxy [openssl]=openssl
	[psql]=postgresql-client [redis-server]=redis-server [redis-cli]=redis-tools
	[mariadbd]=mariadb-server [mariadb-install-db]=mariadb-server [mariadb]=mariadb-client
	[sshd]=openssh-server [ssh]=openssh-client [ssh-keygen]=openssh-client [ssh-keyscan]=openssh-client
	[nc]=netcat-openbsd [curl]=curl [iperf3]=iperf3 [perl]=perl-base
	[podman]=podman [runc]=runc [containerd]=containerd [ctr]=containerd [ldd]=libc-bin
	[gcc]=gcc # the race detector is C
)
# Debian keeps PostgreSQL's own out of any PATH.
postgres=(initdb postgres)

missing=()
if [ "${1:-}" = bench ]; then
	package[stunnel]=stunnel4
	compgen -G '/usr/lib*/nginx/modules/ngx_stream_module.so' >/dev/null || missing+=(libnginx-mod-stream)
fi
for program in "${!package[@]}"; do
	command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
for program in "${postgres[@]}"; do
	compgen -G "/usr/lib/postgresql/*/bin/$program" >/dev/null || missing+=(postgresql)
done
[ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)

[ ${#missing[@]} -eq 0 ] && exit 0
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)

if ! command -v apt-get >/dev/null; then
	echo "deps: please install (this is not Debian or Ubuntu, so the names may differ): ${missing[*]}" >&2
	exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
	echo "deps: please run as root: apt-get install ${missing[*]}" >&2
	exit 1
fi

# Debian starts what it installs unless policy-rc.d says no (invoke-rc.d(8)). The
# machine's own answer, if it has one, is left alone.
guard=/usr/sbin/policy-rc.d
mark='# symbolon: no services while dependencies are installed'
if [ ! -e "$guard" ] || grep -qxF "$mark" "$guard"; then
	trap 'rm -f "$guard"' EXIT
	trap 'exit 130' INT TERM
	printf '#!/bin/sh\n%s\nexit 101\n' "$mark" >"$guard"
	chmod 755 "$guard"
elif "$guard" nginx start >/dev/null 2>&1; then
	echo "deps: $guard lets services start: nginx and the like may be running after this" >&2
fi

echo "deps: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt=(apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
log=$(mktemp)
trap 'rm -f "$log"; if grep -qsxF "$mark" "$guard"; then rm -f "$guard"; fi' EXIT
if ! { "${apt[@]}" update && "${apt[@]}" install --no-install-recommends -y "${missing[@]}"; } >"$log" 2>&1; then
	cat "$log" >&2
	echo "deps: apt-get failed, see above" >&2
	exit 1
fi
echo "deps: done" >&2
