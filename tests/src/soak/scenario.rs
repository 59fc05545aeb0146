// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device implements to be run for long, and the thread that does it.

use std::time::{Duration, Instant};

use fastrand::Rng;

use super::Loss;
use super::fault::Fault;
use super::link::Link;
use super::report::Tally;

/// The longest time between two faults, in milliseconds.
const PAUSE: u64 = 300;

/// How often all that is under way is waited for, and all is compared: once in so many faults.
const SETTLE: u32 = 10;

/// Whether the process is ended and started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lives {
    /// It lives as long as the run, so that what it holds can be compared.
    One,
    /// It is killed again and again.
    Many,
}

impl Lives {
    /// The faults for a device, with those that only it knows.
    fn faults(self, own: &[Fault]) -> Vec<Fault> {
        let deadly = match self {
            Self::One => &[],
            Self::Many => Fault::DEADLY,
        };
        [Fault::COMMON, own, deadly].concat()
    }

    /// The name of a scenario for a device.
    pub fn name(self, device: &str) -> String {
        match self {
            Self::One => device.to_owned(),
            Self::Many => format!("{device}, killed"),
        }
    }
}

/// Makes a scenario, given random numbers for its load.
pub type Start = Box<dyn FnOnce(Rng) -> Result<Box<dyn Scenario>, Loss> + Send>;

/// A device under load.
pub trait Scenario {
    /// The back-end and the connection to it.
    fn link(&mut self) -> &mut Link;

    /// Whether its process is ended and started again.
    fn lives(&self) -> Lives;

    /// The faults that only this device knows. One that is there twice comes twice as often.
    fn own_faults(&self) -> &'static [Fault] {
        &[]
    }

    /// Whether its state can be saved, whatever the guest does.
    fn can_be_saved(&self) -> bool {
        true
    }

    /// Carries load until then, and compares what comes back. Requests may stay under way.
    fn load(&mut self, until: Instant, tally: &Tally) -> Result<(), Loss>;

    /// Takes all that the device has given back, while rings are stopped or the process is gone.
    fn collect(&mut self, tally: &Tally) -> Result<(), Loss>;

    /// The driver begins anew, by `fault`: nothing that was under way comes back.
    fn forget(&mut self, fault: Fault) -> Result<(), Loss>;

    /// The process is gone, and no other one started: looks at what it left.
    fn inspect(&mut self) -> Result<(), Loss> {
        Ok(())
    }

    /// The connection (or, if `is_new`, the process) is another one, and its rings run. With `has_state`, it goes on with all that the old one knew.
    fn connected(&mut self, is_new: bool, has_state: bool) -> Result<(), Loss> {
        let _ = (is_new, has_state);
        Ok(())
    }

    /// Injects a fault that only this device knows.
    fn inject(&mut self, fault: Fault, tally: &Tally) -> Result<(), Loss> {
        let _ = tally;
        Err(Loss(format!("{fault} is not for this device")))
    }

    /// Waits until nothing is under way, and compares everything.
    fn settle(&mut self, tally: &Tally) -> Result<(), Loss>;
}

/// Runs a scenario until `stop` says so, or something is lost.
pub fn drive(start: Start, seed: u64, tally: &Tally, stop: &dyn Fn() -> bool) {
    // Faults and load have their own random numbers: the faults come in the same order, however fast the machine is.
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
        super::link::inject(scenario, fault, &mut own, tally)
            .map_err(|Loss(what)| Loss(format!("{fault}: {what}")))?;
        scenario.link().back_end.check()?;
        tally.started(scenario.link().starts());
        if settles || fault.is_reset() {
            scenario.settle(tally)?;
        }
    }
    scenario.settle(tally)?;
    tally.fault(Fault::Reconnect);
    super::link::inject(scenario, Fault::Reconnect, random, tally)?;
    tally.check_growth().map_err(Loss)?;
    tally.fault(Fault::Sigterm);
    scenario.link().back_end.terminate()?;
    scenario.inspect()
}
