-- pgflow's schema. Closed to everybody but its owner; what each kind of user needs is granted by hand or by
-- `flowgate.grant_worker` and `flowgate.grant_viewer`. Its functions keep EXECUTE for PUBLIC, unreachable without USAGE.
-- Called by: the installer. Locks: the catalog row, until the installer commits. Failure: aborts the install.
create schema if not exists pgflow;
revoke all on schema pgflow from public;
