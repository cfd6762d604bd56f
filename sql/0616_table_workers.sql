-- When a worker said that it stops. Written by: `mark_worker_stopped`. Read by: `ensure_workers`.
alter table pgflow.workers add column if not exists stopped_at timestamptz;
