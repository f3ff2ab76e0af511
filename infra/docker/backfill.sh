#!/bin/sh
# The job of docker-compose: a Ray head on this machine, and the backfill of CONFIG on it. Without CONFIG it makes the
# demo's data and encoders, and backfills them into the object store.
set -eu
export RAY_AUTH_MODE=token # the dashboard asks for it: docker compose exec backfill ray get-auth-token
ray get-auth-token --generate > /dev/null
ray start --head --metrics-export-port=8080 --dashboard-host=0.0.0.0 --disable-usage-stats
export RAY_ADDRESS=auto
set -- --set telemetry.host=0.0.0.0 --set telemetry.discovery_file=/run/fastfill/driver.json --set telemetry.linger_seconds=60
if [ -n "${CONFIG:-}" ]; then
    exec fastfill backfill --config "$CONFIG" "$@"
fi
make_bucket='import s3fs; s3fs.S3FileSystem().makedirs("fastfill", exist_ok=True)'
until python -c "$make_bucket" 2>/dev/null; do sleep 2; done # the server may still be starting
fastfill demo
exec fastfill backfill --config runs/demo/demo.yaml --set run=s3://fastfill/runs/demo "$@"
