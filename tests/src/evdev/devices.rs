// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Real devices, one of each kind, as Linux reports them.

use super::codes::*;
use super::uinput::{Axis, Description};

const fn axis(code: u16, minimum: i32, maximum: i32) -> Axis {
    Axis {
        code,
        minimum,
        maximum,
        fuzz: 0,
        flat: 0,
        resolution: 0,
    }
}

const fn scaled(code: u16, minimum: i32, maximum: i32, fuzz: i32, resolution: i32) -> Axis {
    Axis {
        code,
        minimum,
        maximum,
        fuzz,
        flat: 0,
        resolution,
    }
}

const fn stick(code: u16) -> Axis {
    Axis {
        code,
        minimum: -32768,
        maximum: 32767,
        fuzz: 16,
        flat: 128,
        resolution: 0,
    }
}

/// A keyboard with lights, whose keys the kernel repeats.
pub const KEYBOARD: Description = Description {
    name: "AT Translated Set 2 keyboard",
    ids: [BUS_I8042, 0x0001, 0x0001, 0xab41],
    codes: &[
        (EV_KEY, KEY_ESC..=88),
        (EV_KEY, 96..=111),
        (EV_KEY, 113..=119),
        (EV_KEY, 125..=127),
        (EV_KEY, 0xe0..=0xe1),
        (EV_MSC, MSC_SCAN..=MSC_SCAN),
        (EV_LED, LED_NUML..=LED_SCROLLL),
    ],
    repeats: true,
    ..Description::NOTHING
};

/// A mouse with two wheels of high resolution.
pub const MOUSE: Description = Description {
    name: "Logitech MX Master 3",
    ids: [BUS_USB, 0x046d, 0x4082, 0x0111],
    codes: &[
        (EV_KEY, BTN_LEFT..=BTN_TASK),
        (EV_REL, REL_X..=REL_Y),
        (EV_REL, REL_HWHEEL..=REL_HWHEEL),
        (EV_REL, REL_WHEEL..=REL_WHEEL),
        (EV_REL, REL_WHEEL_HI_RES..=REL_HWHEEL_HI_RES),
        (EV_MSC, MSC_SCAN..=MSC_SCAN),
    ],
    ..Description::NOTHING
};

/// A touchpad that is one button, with two slots (multi-touch protocol type B).
pub const TOUCHPAD: Description = Description {
    name: "SynPS/2 Synaptics TouchPad",
    ids: [BUS_I8042, 0x0002, 0x0007, 0x01b1],
    properties: &[INPUT_PROP_POINTER, INPUT_PROP_BUTTONPAD],
    codes: &[
        (EV_KEY, BTN_LEFT..=BTN_LEFT),
        (EV_KEY, BTN_TOOL_FINGER..=BTN_TOOL_FINGER),
        (EV_KEY, BTN_TOOL_QUINTTAP..=BTN_TOOL_QUINTTAP),
        (EV_KEY, BTN_TOUCH..=BTN_TOUCH),
        (EV_KEY, BTN_TOOL_DOUBLETAP..=BTN_TOOL_QUADTAP),
    ],
    axes: &[
        scaled(ABS_X, 1472, 5472, 8, 60),
        scaled(ABS_Y, 1408, 4448, 8, 85),
        axis(ABS_PRESSURE, 0, 255),
        axis(ABS_TOOL_WIDTH, 0, 15),
        axis(ABS_MT_SLOT, 0, 1),
        scaled(ABS_MT_POSITION_X, 1472, 5472, 8, 60),
        scaled(ABS_MT_POSITION_Y, 1408, 4448, 8, 85),
        axis(ABS_MT_TRACKING_ID, 0, 65535),
        axis(ABS_MT_PRESSURE, 0, 255),
    ],
    ..Description::NOTHING
};

/// A touch screen for ten fingers, with slots (multi-touch protocol type B).
pub const TOUCHSCREEN: Description = Description {
    name: "ELAN Touchscreen",
    ids: [BUS_USB, 0x04f3, 0x0732, 0x0110],
    properties: &[INPUT_PROP_DIRECT],
    codes: &[
        (EV_KEY, BTN_TOUCH..=BTN_TOUCH),
        (EV_MSC, MSC_TIMESTAMP..=MSC_TIMESTAMP),
    ],
    axes: &[
        scaled(ABS_X, 0, 3264, 0, 12),
        scaled(ABS_Y, 0, 1856, 0, 12),
        axis(ABS_MT_SLOT, 0, 9),
        axis(ABS_MT_TOUCH_MAJOR, 0, 255),
        axis(ABS_MT_TOUCH_MINOR, 0, 255),
        axis(ABS_MT_ORIENTATION, 0, 1),
        scaled(ABS_MT_POSITION_X, 0, 3264, 0, 12),
        scaled(ABS_MT_POSITION_Y, 0, 1856, 0, 12),
        axis(ABS_MT_TRACKING_ID, 0, 65535),
    ],
    ..Description::NOTHING
};

/// A pen tablet with pressure and tilt.
pub const TABLET: Description = Description {
    name: "Wacom Intuos Pro M Pen",
    ids: [BUS_USB, 0x056a, 0x0357, 0x0110],
    properties: &[INPUT_PROP_POINTER],
    codes: &[
        (EV_KEY, BTN_TOOL_PEN..=BTN_TOOL_RUBBER),
        (EV_KEY, BTN_STYLUS3..=BTN_STYLUS2),
        (EV_MSC, MSC_SERIAL..=MSC_SERIAL),
    ],
    axes: &[
        scaled(ABS_X, 0, 44800, 4, 200),
        scaled(ABS_Y, 0, 29600, 4, 200),
        scaled(ABS_Z, -900, 899, 0, 287),
        axis(ABS_PRESSURE, 0, 8191),
        scaled(ABS_DISTANCE, 0, 63, 1, 0),
        scaled(ABS_TILT_X, -64, 63, 1, 57),
        scaled(ABS_TILT_Y, -64, 63, 1, 57),
        axis(ABS_MISC, 0, 0),
    ],
    ..Description::NOTHING
};

/// A gamepad with rumble motors.
pub const GAMEPAD: Description = Description {
    name: "Microsoft X-Box 360 pad",
    ids: [BUS_USB, 0x045e, 0x028e, 0x0114],
    codes: &[
        (EV_KEY, BTN_SOUTH..=BTN_EAST),
        (EV_KEY, BTN_NORTH..=BTN_WEST),
        (EV_KEY, BTN_TL..=BTN_TR),
        (EV_KEY, BTN_SELECT..=BTN_THUMBR),
        (EV_FF, FF_RUMBLE..=FF_PERIODIC),
        (EV_FF, FF_SQUARE..=FF_SINE),
        (EV_FF, FF_GAIN..=FF_GAIN),
    ],
    axes: &[
        stick(ABS_X),
        stick(ABS_Y),
        axis(ABS_Z, 0, 255),
        stick(ABS_RX),
        stick(ABS_RY),
        axis(ABS_RZ, 0, 255),
        axis(ABS_HAT0X, -1, 1),
        axis(ABS_HAT0Y, -1, 1),
    ],
    effects: 16,
    ..Description::NOTHING
};

/// A laptop's lid, and whether its screen is turned over.
pub const SWITCHES: Description = Description {
    name: "Intel HID switches",
    ids: [BUS_HOST, 0x0000, 0x0000, 0x0000],
    codes: &[(EV_SW, SW_LID..=SW_TABLET_MODE)],
    ..Description::NOTHING
};

/// A loudspeaker for beeps.
pub const BEEPER: Description = Description {
    name: "PC Speaker",
    ids: [BUS_ISA, 0x001f, 0x0001, 0x0100],
    codes: &[(EV_SND, SND_BELL..=SND_TONE)],
    ..Description::NOTHING
};

/// All of them.
pub const ALL: &[&Description] = &[
    &KEYBOARD,
    &MOUSE,
    &TOUCHPAD,
    &TOUCHSCREEN,
    &TABLET,
    &GAMEPAD,
    &SWITCHES,
    &BEEPER,
];
