//! `flowgate::fuzz::users_file` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| flowgate::fuzz::users_file(data));
