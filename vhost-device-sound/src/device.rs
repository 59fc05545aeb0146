// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The sound device: what it offers, its config space, commands and saved state.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use vhost_device_common::device::{
    Argument, ArgumentType, Arguments, Call, CommandError, ConfigError, Device, Needs, StartError,
    StateError, Verb, Watcher,
};
use vhost_device_common::lock;
use vhost_device_common::state;
use vhost_device_common::worker::Timer;

use crate::backend::{self, Ports, Pulse};
use crate::card::{Card, Saved};
use crate::elements;
use crate::handler::SoundHandler;
use crate::options::Options;
use crate::protocol::F_CTLS;
use crate::request_type;
use crate::stream::Stream;

/// Most streams of a device.
const MAX_STREAMS: usize = 64;

/// The sound device.
pub struct Sound {
    card: Arc<Mutex<Card>>,
    /// Wakes the thread of the queues up.
    wake: Arc<Timer>,
    client: Option<Arc<Mutex<Pulse>>>,
    needs: Needs,
}

impl Device for Sound {
    const TYPE: &'static str = "sound";
    const PROGRAM: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "vhost-user back-end for a virtio sound device";
    // Front-ends that log writes transfer no device state.
    const LOGS: bool = false;
    const STATE_VERSION: u32 = 1;
    const REQUESTS: &'static [&'static str] = request_type::NAMES;
    const VERBS: &'static [Verb] = &[
        Verb {
            name: "query-streams",
            help: "Show the state of all streams: parameters, queued buffers, frames moved, underruns and overruns",
            arguments: &[],
            files: 0,
        },
        Verb {
            name: "set-control",
            help: "Set the value of a control element, and notify the guest",
            arguments: &[
                Argument {
                    name: "name",
                    help: "name of the element, such as \"Master Playback Volume\"",
                    r#type: ArgumentType::String,
                    optional: false,
                },
                Argument {
                    name: "value",
                    help: "value: 0 to 120 for a volume in steps of 0.5 dB, 0 or 1 for a switch",
                    r#type: ArgumentType::Number,
                    optional: false,
                },
            ],
            files: 0,
        },
        Verb {
            name: "set-jack",
            help: "Plug something into a jack, or out, and notify the guest",
            arguments: &[
                Argument {
                    name: "id",
                    help: "number of the jack, which is that of its stream",
                    r#type: ArgumentType::Number,
                    optional: false,
                },
                Argument {
                    name: "connected",
                    help: "whether something is plugged in",
                    r#type: ArgumentType::Boolean,
                    optional: false,
                },
            ],
            files: 0,
        },
    ];

    type Options = Options;
    type Handler = SoundHandler;

    fn open(options: Options) -> Result<Self, StartError> {
        let mut profiles = options.profiles();
        if profiles.len() > MAX_STREAMS {
            return Err(StartError(format!(
                "there are {} streams; --streams can be given {MAX_STREAMS} times at most",
                profiles.len()
            )));
        }
        let Ports {
            ports,
            client,
            needs,
        } = backend::open(&options, &mut profiles)?;
        let streams = profiles.into_iter().zip(ports);
        let streams = streams.map(|(profile, port)| Stream::new(profile, port));
        let wake =
            Timer::new().map_err(|error| StartError(format!("cannot create a timer: {error}")))?;
        Ok(Self {
            card: Arc::new(Mutex::new(Card::new(streams.collect(), options.controls))),
            wake: Arc::new(wake),
            client,
            needs,
        })
    }

    fn features(&self) -> u64 {
        match lock(&self.card).offers_elements() {
            true => F_CTLS,
            false => 0,
        }
    }

    fn set_features(&self, accepted: u64) {
        lock(&self.card).accept_elements(accepted & F_CTLS != 0);
    }

    /// `controlq`, `eventq`, `txq` and `rxq` (VIRTIO 1.3, 5.14.2).
    fn num_queues(&self) -> u16 {
        4
    }

    fn config(&self) -> Vec<u8> {
        lock(&self.card).config()
    }

    /// The driver can only read it; a write of nothing is not an error.
    fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), ConfigError> {
        let size = data.len();
        match data {
            [] => Ok(()),
            _ => Err(ConfigError { offset, size }),
        }
    }

    fn handler(&self, _thread: u16, watcher: Watcher) -> io::Result<SoundHandler> {
        SoundHandler::new(
            Arc::clone(&self.card),
            Arc::clone(&self.wake),
            self.client.clone(),
            &watcher,
        )
    }

    fn new_driver(&self) {
        lock(&self.card).reset();
    }

    fn needs(&self) -> Needs {
        Needs {
            // To wake the thread of the queues up.
            control: vec![Call::new(libc::SYS_timerfd_settime)],
            ..self.needs.clone()
        }
    }

    fn command(
        &self,
        name: &str,
        arguments: &Arguments,
        _files: Vec<OwnedFd>,
    ) -> Result<Value, CommandError> {
        let number = |key: &str| {
            arguments
                .get(key)
                .and_then(Value::as_u64)
                .unwrap_or_default()
        };
        let mut card = lock(&self.card);
        let notifies = match name {
            "query-streams" => return Ok(card.report()),
            "set-control" => {
                let element = arguments
                    .get("name")
                    .and_then(Value::as_str)
                    .unwrap_or_default();
                let index = elements::find(element).filter(|_| card.offers_elements());
                let index = index.ok_or_else(|| {
                    let known: Vec<_> = elements::names().collect();
                    CommandError::Failed(match card.offers_elements() {
                        true => format!(
                            "there is no control element {element:?}; there are {}",
                            known.join(", ")
                        ),
                        false => "this device has no control elements; start it with --controls"
                            .to_owned(),
                    })
                })?;
                let value = number("value");
                let set = u32::try_from(value).ok();
                let set = set.and_then(|value| card.set_element(index, value));
                set.ok_or_else(|| {
                    CommandError::Failed(format!("{element:?} cannot have the value {value}"))
                })?
            }
            "set-jack" => {
                let (id, connected) = (number("id"), arguments.get("connected"));
                let connected = connected.and_then(Value::as_bool).unwrap_or_default();
                let jack = usize::try_from(id).ok();
                let set = jack.and_then(|jack| card.set_jack(jack, connected));
                set.ok_or_else(|| CommandError::Failed(format!("there is no jack {id}")))?
            }
            _ => return Err(CommandError::NotFound(name.to_owned())),
        };
        drop(card);
        if notifies {
            self.wake.set(Duration::ZERO);
        }
        Ok(json!({}))
    }

    fn reset(&self) {
        lock(&self.card).reset();
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(&lock(&self.card).save())
    }

    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        let saved: Saved = state::decode(state)?;
        lock(&self.card).load(saved).map_err(StateError::Contents)
    }
}
