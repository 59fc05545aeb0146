// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults that are the same for each device.

use std::time::Duration;

use fastrand::Rng;
use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq;

use super::fault::Fault;
use super::link::MOVING_SIZE;
use super::loss::Loss;
use super::report::Tally;
use super::scenario::{Lives, Scenario};
use crate::front_end::memory::Region;
use crate::front_end::state::HEADER_SIZE;

/// Injects a fault into a device under load, and repairs it.
pub fn inject(
    scenario: &mut dyn Scenario,
    fault: Fault,
    random: &mut Rng,
    tally: &Tally,
) -> Result<(), Loss> {
    let count = scenario.link().queues.len();
    let index = random.usize(..count);
    match fault {
        Fault::GetVringBase => {
            let base = scenario.link().stop(index)?;
            scenario.collect(tally)?;
            scenario.link().start(index, base)?;
            scenario.link().enable(index, true)?;
        }
        Fault::SetVringEnable => {
            let front_end = &scenario.link().front_end;
            front_end.enable(index, false)?;
            std::thread::sleep(Duration::from_millis(random.u64(..5)));
            let front_end = &scenario.link().front_end;
            front_end.enable(index, true)?;
        }
        Fault::SetVringKick => {
            let link = scenario.link();
            let (queue, front_end) = (&link.queues[index], &link.front_end);
            front_end.call().set_vring_call(index, queue.call_fd())?;
            front_end.call().set_vring_kick(index, queue.kick_fd())?;
            front_end.call().set_vring_err(index, queue.error_fd())?;
        }
        Fault::Kick => {
            for _ in 0..random.u32(1..100) {
                scenario.link().queues[index].kick_anyway();
            }
        }
        Fault::ResetDevice => {
            let raw = scenario.link().front_end.raw()?;
            let refused = raw.acknowledged(FrontendReq::RESET_DEVICE, &[], &[])?;
            if refused != 0 {
                return Err(Loss(format!("{refused} for RESET_DEVICE")));
            }
            scenario.collect(tally)?;
            scenario.link().renew(random)?;
            scenario.forget(fault)?;
        }
        Fault::DriverReset => {
            scenario.link().stop_all()?;
            scenario.collect(tally)?;
            scenario.link().renew(random)?;
            scenario.forget(fault)?;
        }
        Fault::AddMemReg | Fault::RemMemReg => {
            let link = scenario.link();
            match link.moving.take() {
                Some(address) => link.front_end.remove_region(address)?,
                None => {
                    let address = link.add_moving();
                    link.front_end.add_region(address, MOVING_SIZE)?;
                }
            }
        }
        Fault::SetMemTable => {
            let link = scenario.link();
            let mut memory = link.memory().clone();
            if random.bool() {
                match link.moving.take() {
                    Some(address) => _ = memory.remove(address),
                    None => {
                        _ = memory.add(Region::new(link.add_moving(), MOVING_SIZE));
                    }
                }
            }
            link.front_end.replace_memory(memory)?;
        }
        Fault::SetLogBase => {
            scenario.collect(tally)?;
            let link = scenario.link();
            match link.logging.is_some() && random.bool() {
                true => link.stop_log()?,
                false => link.log()?,
            }
        }
        Fault::Reconnect => {
            let bases = scenario.link().stop_all()?;
            scenario.collect(tally)?;
            scenario.link().disconnect(tally)?;
            scenario.link().connect()?;
            scenario.link().start_all(&bases)?;
            scenario.connected(false, false)?;
        }
        Fault::Vanish => {
            scenario.link().disconnect(tally)?;
            scenario.collect(tally)?;
            scenario.link().connect()?;
            scenario.link().start_unknown()?;
            scenario.connected(false, false)?;
        }
        Fault::Sigterm | Fault::Sigkill => {
            replace_process(scenario, fault, tally)?;
            scenario.link().connect()?;
            scenario.link().start_unknown()?;
            scenario.connected(true, false)?;
        }
        Fault::DeviceState => {
            let bases = scenario.link().stop_all()?;
            scenario.collect(tally)?;
            let state = scenario.link().front_end.save_state()?;
            let is_new = scenario.lives() == Lives::Many;
            match is_new {
                true => replace_process(scenario, Fault::Sigterm, tally)?,
                false => scenario.link().disconnect(tally)?,
            }
            let link = scenario.link();
            link.connect()?;
            link.front_end.load_state(&state)?;
            link.renew_inflight()?;
            link.start_all(&bases)?;
            scenario.connected(is_new, state.len() > HEADER_SIZE)?;
        }
        Fault::Garbage => scenario.link().send_garbage(random)?,
        _ => scenario.inject(fault, tally)?,
    }
    Ok(())
}

/// Ends the process, by SIGKILL or SIGTERM, and starts another one.
fn replace_process(scenario: &mut dyn Scenario, signal: Fault, tally: &Tally) -> Result<(), Loss> {
    let back_end = &mut scenario.link().back_end;
    match signal {
        Fault::Sigkill => back_end.kill()?,
        _ => back_end.terminate()?,
    }
    tally.reborn();
    scenario.link().garbage.clear();
    scenario.collect(tally)?;
    scenario.inspect()?;
    scenario.link().back_end.start_again()
}
