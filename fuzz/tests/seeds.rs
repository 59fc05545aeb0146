// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the seeds of the fuzz targets, and some random inputs, without libFuzzer and its compiler flags.

#![cfg(test)]

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use arbitrary::{Arbitrary, Unstructured};
use vhost_device_fuzz::{block, console, gpu, input, ring, scsi, session, sound, vsock};

/// The number of random inputs of each target, and their maximum size in bytes.
const RANDOM: usize = 100;
const MOST_BYTES: usize = 1024;

/// Only one target runs at a time, because they check the memory and the open files of the process.
static ALONE: Mutex<()> = Mutex::new(());

fn run_all<I: for<'a> Arbitrary<'a>>(target: &str, run: fn(I)) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("seeds")
        .join(target);
    let mut count = 0;
    for seed in fs::read_dir(&seeds).unwrap() {
        let bytes = fs::read(seed.unwrap().path()).unwrap();
        run(I::arbitrary_take_rest(Unstructured::new(&bytes)).unwrap());
        count += 1;
    }
    assert!(count > 0, "{} is empty", seeds.display());
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..RANDOM {
        let mut bytes = vec![0; random.usize(..MOST_BYTES)];
        random.fill(&mut bytes);
        run(I::arbitrary_take_rest(Unstructured::new(&bytes)).unwrap());
    }
}

#[test]
fn block_survives_its_seeds() {
    run_all("block", block::Input::run);
}

#[test]
fn console_survives_its_seeds() {
    run_all("console", console::Input::run);
}

#[test]
fn gpu_survives_its_seeds() {
    run_all("gpu", gpu::Input::run);
}

#[test]
fn input_survives_its_seeds() {
    run_all("input", input::Input::run);
}

#[test]
fn ring_survives_its_seeds() {
    run_all("ring", ring::Input::run);
}

#[test]
fn scsi_survives_its_seeds() {
    run_all("scsi", scsi::Input::run);
}

#[test]
fn session_survives_its_seeds() {
    run_all("session", session::Input::run);
}

#[test]
fn vsock_survives_its_seeds() {
    run_all("vsock", vsock::Input::run);
}

#[test]
fn sound_survives_its_seeds() {
    run_all("sound", sound::Input::run);
}
