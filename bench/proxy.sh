#!/usr/bin/env bash
# pgbench direct, through PgBouncer and through Flowgate, interleaved: each round runs every combination once on every
# target, in an order that turns from round to round, so that whatever else the machine does meets all of them.
# Reports medians over the rounds: transactions/s, latency (mean, p50, p99) and the proxy's own CPU time a transaction.
# Starts its own Postgres and proxies on free ports, in a folder of its own, and leaves nothing behind.
#
#   bench/proxy.sh [--rounds 3] [--seconds 4] [--clients "1 16 64"] [--workloads "select tpcb"]
#                  [--modes "simple extended prepared"] [--pool 10] [--scale 10] [--flowgate target/release/flowgate]
#                  [--targets "direct pgbouncer flowgate"] [--raw FILE]
#
# Needs pgbench and a Postgres server (15 or later); without pgbouncer that column is left out. PgBouncer before 1.21
# knows no prepared statements in transaction mode: n/a there.
set -euo pipefail
export LC_ALL=C

rounds=3 seconds=4 clients="1 16 64" workloads="select tpcb" modes="simple extended prepared"
pool=10 scale=10 flowgate="" targets="direct pgbouncer flowgate" raw=""
while [ $# -gt 0 ]; do
    case $1 in
        --rounds | --seconds | --clients | --workloads | --modes | --pool | --scale | --flowgate | --targets | --raw)
            declare "${1#--}=${2?$1 needs a value}"
            shift 2
            ;;
        *)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
            exit 2
            ;;
    esac
done

say() { printf '%s\n' "$*" >&2; }
die() { say "bench/proxy.sh: $*"; exit 1; }

root=$(cd "$(dirname "$0")/.." && pwd)
flowgate=${flowgate:-${CARGO_TARGET_DIR:-$root/target}/release/flowgate}
[ -x "$flowgate" ] || die "no $flowgate: cargo build --release first, or name one with --flowgate"
bin=${FLOWGATE_PG_BIN:-$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1)}
bin=${bin:-$(dirname "$(command -v postgres || echo /none/postgres)")}
for program in initdb postgres pgbench psql; do
    [ -x "$bin/$program" ] || die "no $program in $bin (apt-get install postgresql postgresql-client)"
done
pgbouncer=$(command -v pgbouncer || ls /usr/sbin/pgbouncer 2>/dev/null || true)
[ -n "$pgbouncer" ] || { say "no pgbouncer: its column is left out"; targets=${targets/pgbouncer/}; }

# Neither Postgres nor PgBouncer runs as root. Everything runs as one user, on equal terms.
work=$(mktemp -d /tmp/flowgate-bench.XXXXXX)
as=()
if [ "$(id -u)" = 0 ]; then
    user=nobody
    chown -R "$user" "$work"
    as=(setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups --)
    cp "$flowgate" "$work/flowgate" # the user may not reach a folder of root's
    chmod 755 "$work/flowgate"
    flowgate=$work/flowgate
fi
cd "$work"

pids=()
clean_up() {
    trap - EXIT INT TERM
    for pid in "${pids[@]}"; do kill -INT "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
free_port() {
    local port
    while port=$((20000 + RANDOM % 12000)); answers "$port"; do :; done
    echo "$port"
}
await() { # port, pid, name
    local tries=0
    until answers "$1"; do
        kill -0 "$2" 2>/dev/null || { cat "$work/$3.log" >&2; die "$3 did not start"; }
        tries=$((tries + 1))
        [ "$tries" -lt 300 ] || die "$3 does not answer on port $1"
        sleep 0.1
    done
}

direct_port=$(free_port)
"${as[@]}" "$bin/initdb" -D "$work/data" -U bench -A trust -E UTF8 --locale=C --no-sync >initdb.log 2>&1 || { cat initdb.log >&2; die "initdb failed"; }
# fsync off: what is compared is what stands between client and server, not the disk.
"${as[@]}" "$bin/postgres" -D "$work/data" -p "$direct_port" -k "$work" -c listen_addresses=127.0.0.1 -c max_connections=300 \
    -c shared_buffers=256MB -c fsync=off -c synchronous_commit=off -c autovacuum=off -c max_wal_size=4GB >postgres.log 2>&1 &
pids+=($!)
await "$direct_port" $! postgres
sql() { "${as[@]}" "$bin/psql" -h 127.0.0.1 -p "$direct_port" -U bench -d "$1" -XAtqc "$2"; }
until sql postgres 'select 1' >/dev/null 2>&1; do sleep 0.1; done
sql postgres 'create database bench'
say "initialising pgbench, scale $scale"
"${as[@]}" "$bin/pgbench" -h 127.0.0.1 -p "$direct_port" -U bench -i -q -s "$scale" bench >init.log 2>&1 || { cat init.log >&2; die "pgbench -i failed"; }

declare -A port pid
port[direct]=$direct_port
has() { case " $targets " in *" $1 "*) true ;; *) false ;; esac; }
if has pgbouncer; then
    port[pgbouncer]=$(free_port)
    echo '"bench" ""' >users.txt
    cat >pgbouncer.ini <<INI
[databases]
bench = host=127.0.0.1 port=$direct_port dbname=bench
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = ${port[pgbouncer]}
unix_socket_dir =
auth_type = trust
auth_file = $work/users.txt
pool_mode = transaction
default_pool_size = $pool
max_client_conn = 1000
log_connections = 0
log_disconnections = 0
ignore_startup_parameters = extra_float_digits
INI
    chown --reference="$work" users.txt pgbouncer.ini
    "${as[@]}" "$pgbouncer" -q pgbouncer.ini >pgbouncer.log 2>&1 &
    pid[pgbouncer]=$!
    pids+=($!)
    await "${port[pgbouncer]}" $! pgbouncer
fi
if has flowgate; then
    port[flowgate]=$(free_port)
    "${as[@]}" "$flowgate" serve --primary "postgres://bench@127.0.0.1:$direct_port/bench" --auth trust --http off \
        --pool-size "$pool" --listen "127.0.0.1:${port[flowgate]}" --log warn >flowgate.log 2>&1 &
    pid[flowgate]=$!
    pids+=($!)
    await "${port[flowgate]}" $! flowgate
fi

bouncer_version=$([ -z "$pgbouncer" ] || "$pgbouncer" --version | sed -n '1s/.* //p')
no_prepared() { # target, mode
    [ "$1" = pgbouncer ] && [ "$2" = prepared ] && [ "$(printf '%s\n' "$bouncer_version" 1.21 | sort -V | head -1)" != 1.21 ]
}
# User and system time of a process in microseconds, all its threads; the kernel counts in hundredths of a second.
cpu_us() { [ -z "$1" ] && echo 0 || sed 's/.*) //' "/proc/$1/stat" | awk -v hz="$(getconf CLK_TCK)" '{ printf "%d\n", ($12 + $13) * 1000000 / hz }'; }

table=$work/table
: >"$table"
measure() { # round workload mode clients target
    local flags before after transactions threads=$(($4 < 2 ? 1 : 2))
    [ "$2" = select ] && flags=-S || flags="-b tpcb-like"
    # pgbench prepares with its thread blocked. Once clients outnumber servers, that thread may wait for a server that
    # another client of its own holds in a transaction it cannot go on with: hence a thread a client.
    [ "$2 $3" != "tpcb prepared" ] || [ "$4" -le "$pool" ] || threads=$4
    rm -f pgbench_log.*
    before=$(cpu_us "${pid[$5]-}")
    # shellcheck disable=SC2086
    "${as[@]}" "$bin/pgbench" -h 127.0.0.1 -p "${port[$5]}" -U bench -n $flags -M "$3" -c "$4" -j "$threads" \
        -T "$seconds" -l bench >out 2>err || { cat err >&2; die "pgbench failed: $5 $2 $3 $4"; }
    after=$(cpu_us "${pid[$5]-}")
    transactions=$(sed -n 's/^number of transactions actually processed: \([0-9]*\).*/\1/p' out)
    cut -d' ' -f3 pgbench_log.* | sort -n | awk -v tps="$(sed -n 's/^tps = \([0-9.]*\).*/\1/p' out)" \
        -v cpu="$((after - before))" -v n="$transactions" -v key="$1 $2 $3 $4 $5" '
        { at[NR] = $1; sum += $1 }
        function rank(q) { return at[int((NR - 1) * q) + 1] }
        END { printf "%s %.1f %.1f %d %d %.2f\n", key, tps, sum / NR, rank(0.5), rank(0.99), n ? cpu / n : 0 }' | tee -a "$table" >&2
}

load=$(cut -d' ' -f1-3 /proc/loadavg)
say "round workload mode clients target | tps, mean µs, p50 µs, p99 µs, proxy CPU µs a transaction"
read -ra order <<<"$targets"
for round in $(seq "$rounds"); do
    for workload in $workloads; do
        for mode in $modes; do
            for count in $clients; do
                # TPC-B's balance must not depend on who ran before.
                for turn in "${!order[@]}"; do
                    target=${order[$(((turn + round) % ${#order[@]}))]}
                    no_prepared "$target" "$mode" || measure "$round" "$workload" "$mode" "$count" "$target"
                done
            done
        done
    done
done
[ -z "$raw" ] || { cd "$OLDPWD"; cp "$table" "$raw"; cd "$work"; }

cat <<TEXT
$(date -u +%F), $("$flowgate" --version), PgBouncer ${bouncer_version:-none}, $("$bin/postgres" --version | sed 's/ (PostgreSQL)//'), pool of $pool, pgbench scale $scale, fsync off,
$(nproc) cores ($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)), Linux $(uname -r | cut -d- -f1); pgbench, Postgres and the proxies share them. Load average before the first round: $load.
Medians of $rounds interleaved rounds of $seconds s; ratios are medians of each round's own. Latency in µs, CPU in µs of the proxy's own process a transaction.

| workload | protocol | clients | target | TPS | mean | p50 | p99 | CPU | TPS / direct | TPS / PgBouncer | CPU / PgBouncer |
|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|
TEXT
awk -v workloads="$workloads" -v modes="$modes" -v clients="$clients" -v targets="$targets" '
    { key = $2 " " $3 " " $4 " " $5; n[key]++; for (i = 6; i <= 10; i++) value[key, i, n[key]] = $i }
    # Of a field, or of its ratio to the same field of another in the same round.
    function median(key, field, other,    i, j, k, sorted, x) {
        k = n[key]
        for (i = 1; i <= k; i++) {
            x = value[key, field, i]
            if (other != "") x = value[other, field, i] ? x / value[other, field, i] : 0
            for (j = i; j > 1 && sorted[j - 1] > x; j--) sorted[j] = sorted[j - 1]
            sorted[j] = x
        }
        return k % 2 ? sorted[(k + 1) / 2] : (sorted[k / 2] + sorted[k / 2 + 1]) / 2
    }
    function ratio(key, other, field) {
        if (key == other || n[other] != n[key]) return "–"
        return sprintf("%.2f", median(key, field, other))
    }
    END {
        wn = split(workloads, w, " "); mn = split(modes, m, " "); cn = split(clients, c, " "); tn = split(targets, t, " ")
        for (a = 1; a <= wn; a++) for (b = 1; b <= mn; b++) for (d = 1; d <= cn; d++) for (e = 1; e <= tn; e++) {
            base = w[a] " " m[b] " " c[d] " "
            key = base t[e]
            head = sprintf("| %s | %s | %s | %s |", w[a] == "select" ? "SELECT (-S)" : "TPC-B", m[b], c[d], t[e])
            if (!n[key]) { print head " n/a | | | | | | | |"; continue }
            direct = t[e] == "direct"
            printf "%s %.0f | %.0f | %.0f | %.0f | %s | %s | %s | %s |\n", head, median(key, 6), median(key, 7), median(key, 8), median(key, 9),
                direct ? "–" : sprintf("%.1f", median(key, 10)), ratio(key, base "direct", 6),
                direct ? "–" : ratio(key, base "pgbouncer", 6), direct ? "–" : ratio(key, base "pgbouncer", 10)
        }
    }' "$table"
