// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! GPU: resources are created, drawn to and destroyed in random order within bounds, shown by a display, and compared pixel by pixel; with 3D,
//! the renderer draws some of them.

mod driver;
mod guest;
pub mod screen;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::process::Stdio;
use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost::vhost_user::message::FrontendReq;

use super::back_end::BackEnd;
use super::fault::Fault;
use super::link::{Link, MOVING_SIZE};
use super::loss::Loss;
use super::report::Tally;
use super::scenario::{Lives, Scenario, Start};
use crate::front_end::gpu::{Answers, Display, number, words};
use crate::process::{self, Resources};
use driver::Driver;
use guest::Resource;
use screen::{Picture, Rectangle, Screen};

/// Scanouts that are used.
const SHOWN: usize = 4;
/// Limit of host memory for resources, which is too small for all of them.
const LIMIT: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Time limit for a picture to become correct.
const SETTLED: Duration = Duration::from_secs(30);
/// The mode that displays report; a device without a display reports another one.
const MODE: [u32; 2] = [800, 600];
/// Resources that the 3D libraries keep after their first use: files, and threads.
const KEPT: usize = 8;

/// Returns how to start the scenario, with or without 3D.
pub fn start(three_d: bool, lives: Lives) -> (String, Start) {
    let start = move |random| Ok(Box::new(Gpu::new(three_d, lives, random)?) as Box<dyn Scenario>);
    let name = if three_d { "gpu 3D" } else { "gpu" };
    (lives.name(name), Box::new(start))
}

/// Returns whether this host can draw 3D; if not, prints why.
pub fn has_three_d() -> bool {
    let has = || {
        let mut command = process::command("vhost-device-gpu").ok()?;
        command.arg("--print-capabilities").stderr(Stdio::null());
        let output = command.output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.contains("\"virgl\""))
    };
    let has = has() == Some(true);
    if !has {
        println!("soak: this host cannot run gpu 3D: no virglrenderer here can draw");
    }
    has
}

/// The scenario.
struct Gpu {
    driver: Driver,
    lives: Lives,
    three_d: bool,
    random: Rng,
    resources: BTreeMap<u32, Resource>,
    /// The picture of each scanout.
    scanouts: [Option<(u32, Rectangle)>; SHOWN],
    cursors: [Option<(u32, u32)>; SHOWN],
    display: Option<Display>,
    screen: Screen,
    /// Whether the display reads everything at once, and answers.
    is_prompt: bool,
    has_context: bool,
    /// Address of the memory for the pages of resources.
    pages: u64,
}

impl Gpu {
    fn new(three_d: bool, lives: Lives, mut random: Rng) -> Result<Self, Loss> {
        let mut arguments = vec![format!("--max-hostmem={LIMIT}").into()];
        arguments.extend(three_d.then(|| "--virgl".into()));
        let kept = if three_d { KEPT } else { 0 };
        let keeps = Resources {
            files: kept,
            threads: kept,
            mappings: kept,
        };
        let back_end = BackEnd::start("vhost-device-gpu", arguments, keeps)?;
        let link = Link::new(back_end, &[64, 16], &[(0, 8 << 20)], &mut random)?;
        let mut gpu = Self {
            pages: link.memory().allocate(MOVING_SIZE as u64, PAGE),
            driver: Driver::new(link),
            lives,
            three_d,
            random,
            resources: BTreeMap::new(),
            scanouts: [None; SHOWN],
            cursors: [None; SHOWN],
            display: None,
            screen: Screen::default(),
            is_prompt: false,
            has_context: false,
        };
        gpu.set_display(Answers::default())?;
        Ok(gpu)
    }

    /// Passes a display to the device.
    fn set_display(&mut self, answers: Answers) -> Result<(), Loss> {
        self.is_prompt = answers.display_info.is_some();
        let (display, socket) = Display::new(answers);
        let raw = self.driver.link.front_end.raw()?;
        let refused = raw.acknowledged(FrontendReq::GPU_SET_SOCKET, &[], &[socket.as_fd()])?;
        if refused != 0 {
            return Err(Loss(format!("{refused} for GPU_SET_SOCKET")));
        }
        self.screen = Screen::default();
        self.display = Some(display);
        Ok(())
    }

    /// Shows all of a resource, and compares the scanouts that show it.
    fn flush(&mut self, number: u32) -> Result<(), Loss> {
        let whole = self.resources[&number].picture.whole();
        let part = self.rectangle(whole);
        self.driver
            .done(number::FLUSH, &[&part[..], &[number, 0]].concat())?;
        self.driver
            .done(number::FLUSH, &[&whole[..], &[number, 0]].concat())?;
        match self.is_prompt {
            true => self.compare(Some(number)),
            false => self.look(),
        }
    }

    /// Processes the messages to the display.
    fn look(&mut self) -> Result<(), Loss> {
        if let Some(display) = &self.display {
            while let Some(shown) = display.next_within(Duration::ZERO) {
                self.screen.show(shown)?;
            }
        }
        Ok(())
    }

    /// Waits until the display shows the scanouts of a resource (or all) correctly. The answer to a request arrives after all earlier
    /// messages.
    fn compare(&mut self, number: Option<u32>) -> Result<(), Loss> {
        let deadline = Instant::now() + SETTLED;
        loop {
            let info = self.driver.run(number::GET_DISPLAY_INFO, &[])?;
            self.look()?;
            let answered = info.body.get(8..16) == Some(&words(&MODE));
            let difference = self.difference(number);
            if answered && difference.is_none() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let what = difference.unwrap_or("it does not answer".to_owned());
                return Err(Loss(format!("the display shows a wrong picture: {what}")));
            }
        }
    }

    fn difference(&self, number: Option<u32>) -> Option<String> {
        for (index, shown) in self.scanouts.iter().enumerate() {
            let seen = self.screen.scanout(index);
            let (expected, is_3d) = match shown {
                Some((shown, _)) if number.is_some_and(|number| number != *shown) => continue,
                Some((shown, rectangle)) => {
                    let resource = &self.resources[shown];
                    (resource.picture.part(*rectangle), resource.is_3d)
                }
                None => (Picture::default(), false),
            };
            let mask = if is_3d { 0xff_ffff } else { u32::MAX };
            if let Some(difference) = seen.difference(&expected, mask) {
                return Some(format!("scanout {index}, {shown:?}: {difference}"));
            }
            let (seen, expected) = (self.screen.cursor(index), self.cursors[index]);
            if number.is_none() && seen != expected {
                return Some(format!("cursor {index}: {seen:?} instead of {expected:?}"));
            }
        }
        None
    }

    fn step(&mut self, tally: &Tally) -> Result<(), Loss> {
        let number = match (self.any(), self.random.u32(..20)) {
            (None, _) | (_, 0..2) => {
                self.create()?;
                tally.answered(0);
                return Ok(());
            }
            (Some(number), _) => number,
        };
        match self.random.u32(..20) {
            0 => self.unref(number)?,
            1..4 => self.attach(number)?,
            4..11 => self.draw(number)?,
            11..13 => self.set_scanout(number)?,
            13..18 => self.flush(number)?,
            _ => self.move_cursor()?,
        }
        let picture = self
            .resources
            .get(&number)
            .map(|resource| &resource.picture);
        let pixels = picture.map_or(0, |picture| picture.pixels().len() as u64);
        tally.answered(4 * pixels);
        Ok(())
    }

    /// Forgets the guest's screen and resources, after a reset of the guest or the device.
    fn clear(&mut self) {
        self.resources.clear();
        self.scanouts = [None; SHOWN];
        self.has_context = false;
    }
}

impl Scenario for Gpu {
    fn link(&mut self) -> &mut Link {
        &mut self.driver.link
    }

    fn lives(&self) -> Lives {
        self.lives
    }

    fn own_faults(&self) -> &'static [Fault] {
        Fault::DISPLAY
    }

    /// State of the renderer cannot be saved.
    fn can_be_saved(&self) -> bool {
        !self.three_d
    }

    fn load(&mut self, until: Instant, tally: &Tally) -> Result<(), Loss> {
        while Instant::now() < until {
            self.step(tally)?;
        }
        // One command is in flight whatever happens next.
        let number = self.any().unwrap_or(1);
        self.driver
            .send(number::FLUSH, &words(&[0, 0, 1, 1, number, 0]))
    }

    fn collect(&mut self, _tally: &Tally) -> Result<(), Loss> {
        self.driver.receive().map(|_| ())
    }

    fn forget(&mut self, fault: Fault) -> Result<(), Loss> {
        self.driver.forget();
        self.clear();
        match fault {
            // The display continues, and shows nothing.
            Fault::DriverReset => {
                self.cursors = [None; SHOWN];
                Ok(())
            }
            _ => self.connected(false, false),
        }
    }

    fn connected(&mut self, _is_new: bool, has_state: bool) -> Result<(), Loss> {
        if !has_state {
            self.clear();
            self.cursors = [None; SHOWN];
        }
        self.set_display(Answers::default())
    }

    fn inject(&mut self, fault: Fault, tally: &Tally) -> Result<(), Loss> {
        const WHILE: Duration = Duration::from_millis(200);
        let silent = Answers {
            display_info: None,
            edid: None,
            ..Answers::default()
        };
        match fault {
            Fault::GpuSetSocket => self.set_display(Answers::default()),
            Fault::LostDisplay => {
                self.display = None;
                self.is_prompt = false;
                self.load(Instant::now() + WHILE, tally)?;
                self.set_display(Answers::default())
            }
            Fault::SilentDisplay => {
                self.set_display(silent)?;
                self.load(Instant::now() + WHILE, tally)?;
                self.driver.run(number::GET_EDID, &words(&[0, 0]))?;
                self.set_display(Answers::default())
            }
            _ => {
                let delay = match fault {
                    Fault::SlowDisplay => Duration::from_millis(5),
                    _ => Duration::from_millis(1500),
                };
                self.is_prompt = false;
                self.display
                    .iter()
                    .for_each(|display| display.set_delay(delay));
                self.load(Instant::now() + WHILE, tally)?;
                let now = Duration::ZERO;
                self.display
                    .iter()
                    .for_each(|display| display.set_delay(now));
                self.is_prompt = true;
                Ok(())
            }
        }
    }

    fn settle(&mut self, _tally: &Tally) -> Result<(), Loss> {
        self.driver.finish()?;
        for (number, _) in self.scanouts.into_iter().flatten() {
            let whole = self.resources[&number].picture.whole();
            self.driver
                .done(number::FLUSH, &[&whole[..], &[number, 0]].concat())?;
        }
        self.compare(None)
    }
}
