-- Schema of Flowgate's own objects: the outbox, its bookkeeping, and what the installer records.
-- Called by: the installer. Locks: the catalog row, until the installer commits. Failure: aborts the install.
-- Nobody but the owner may look inside; `flowgate.grant_worker` and `flowgate.grant_viewer` open what is needed.
create schema if not exists flowgate;
revoke all on schema flowgate from public;
