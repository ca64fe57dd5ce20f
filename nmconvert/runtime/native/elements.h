// Elements of 8, 16 and 64 bits, widened and narrowed.
#pragma once

#include <vector>

#include "matrix.h"

namespace nmconvert {

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
float bfloat_to_float(uint16_t bits);
uint16_t float_to_bfloat(float value);

// The values as floats: a pointer into the file where they are stored so, else into `widened`.
const float* widen(const Constant& values, std::vector<float>& widened);

}  // namespace nmconvert
