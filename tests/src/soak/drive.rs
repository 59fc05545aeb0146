// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread that drives a scenario: it alternates load and faults.

use std::time::{Duration, Instant};

use fastrand::Rng;

use super::fault::Fault;
use super::inject::inject;
use super::loss::Loss;
use super::report::Tally;
use super::scenario::{Scenario, Start};

/// Maximum time between two faults, in milliseconds.
const PAUSE: u64 = 300;

/// Settles after one in this many faults: waits for all requests in flight, and compares everything.
const SETTLE: u32 = 10;

/// Runs a scenario until `stop` returns true, or something is lost.
pub fn drive(start: Start, seed: u64, tally: &Tally, stop: &dyn Fn() -> bool) {
    // Faults and load use separate random numbers: the order of the faults does not depend on the speed of the machine.
    let name = tally.name();
    let mix = name.bytes().fold(seed, |mix, byte| {
        mix.wrapping_mul(0x100_0000_01b3) ^ u64::from(byte)
    });
    let mut random = Rng::with_seed(mix);
    let load = random.fork();
    let mut scenario = match start(load) {
        Ok(scenario) => scenario,
        Err(Loss(what)) => return tally.lose(what, ""),
    };
    let result = run(scenario.as_mut(), &mut random, tally, stop);
    if let Err(Loss(what)) = result {
        let log = scenario.link().back_end.log();
        tally.lose(what, &log);
    }
}

fn run(
    scenario: &mut dyn Scenario,
    random: &mut Rng,
    tally: &Tally,
    stop: &dyn Fn() -> bool,
) -> Result<(), Loss> {
    let mut faults = scenario.lives().faults(scenario.own_faults());
    faults.retain(|fault| *fault != Fault::DeviceState || scenario.can_be_saved());
    while !stop() {
        let pause = Duration::from_millis(random.u64(..PAUSE));
        let fault = faults[random.usize(..faults.len())];
        let settles = random.u32(..SETTLE) == 0;
        let mut own = random.fork();
        scenario.load(Instant::now() + pause, tally)?;
        tally.fault(fault);
        inject(scenario, fault, &mut own, tally)
            .map_err(|Loss(what)| Loss(format!("{fault}: {what}")))?;
        scenario.link().back_end.check()?;
        tally.started(scenario.link().starts());
        if settles || fault.is_reset() {
            scenario.settle(tally)?;
        }
    }
    scenario.settle(tally)?;
    tally.fault(Fault::Reconnect);
    inject(scenario, Fault::Reconnect, random, tally)?;
    tally.check_growth().map_err(Loss)?;
    tally.fault(Fault::Sigterm);
    scenario.link().back_end.terminate()?;
    scenario.inspect()
}
