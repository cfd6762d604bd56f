# syntax=docker/dockerfile:1
# The server without the demo's part, with pgmq's SQL so that `install` works on any Postgres.
#
#   docker build -t flowgate .
#   docker run -e FLOWGATE_PRIMARY__URL=postgres://flowgate:…@db:5432/app -p 6432:6432 -p 6480:6480 flowgate
#   docker run --rm flowgate install --primary postgres://postgres:…@db:5432/app
#
# A config file instead: -v ./flowgate.toml:/etc/flowgate.toml:ro … flowgate serve --config /etc/flowgate.toml
# `docker stop` waits 10 s, listen.drain_timeout is 30 s: stop with `-t 35`, or set it lower.

FROM rust:1-bookworm AS build
WORKDIR /src
COPY . .
# The caches keep dependencies between builds; the program must leave them before the layer ends.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --locked --release --no-default-features --features pgmq-sql \
    && strip --strip-debug -o /usr/local/bin/flowgate target/release/flowgate

FROM debian:bookworm-slim
RUN groupadd --system --gid 6432 flowgate \
    && useradd --system --uid 6432 --gid flowgate --no-create-home --shell /usr/sbin/nologin flowgate
COPY --from=build /usr/local/bin/flowgate /usr/local/bin/flowgate
COPY LICENSE-APACHE LICENSE-MIT /usr/share/doc/flowgate/
# Open inside the container; who may connect is what `-p` and the network say, and the login.
ENV FLOWGATE_LISTEN__POSTGRES=0.0.0.0:6432 \
    FLOWGATE_LISTEN__HTTP=0.0.0.0:6480
USER flowgate
EXPOSE 6432 6480
# Whether the process lives; a failing Postgres is no reason to restart it (that is /readyz). The image has no curl.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/6480 && printf 'GET /healthz HTTP/1.0\\r\\n\\r\\n' >&3 && read -r _ status _ <&3 && [ \"$status\" = 200 ]"]
ENTRYPOINT ["flowgate"]
CMD ["serve"]
