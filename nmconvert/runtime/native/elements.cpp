#include "elements.h"

#include <cstring>

#include "ort_abi.h"

namespace nmconvert {

namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(fraction) * 5.9604644775390625e-8f));  // 2^-24
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

uint16_t float_to_half(float value) {
  uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000)                         // subnormal: let the adder round to a multiple of 2^-24
    return sign | static_cast<uint16_t>(bits_of(float_of(bits) + 0.5f) - 0x3f000000);
  return sign | static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}

float bfloat_to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

const float* widen(const Constant& values, std::vector<float>& widened) {
  if (values.type == ort::kFloat) return static_cast<const float*>(values.data);
  const int64_t size = values.size();
  widened.resize(size);
  const uint16_t* halves = static_cast<const uint16_t*>(values.data);
  switch (values.type) {
    case ort::kInt8:
      for (int64_t i = 0; i < size; ++i) widened[i] = static_cast<const int8_t*>(values.data)[i];
      break;
    case ort::kFloat16:
      for (int64_t i = 0; i < size; ++i) widened[i] = half_to_float(halves[i]);
      break;
    case ort::kBfloat16:
      for (int64_t i = 0; i < size; ++i) widened[i] = bfloat_to_float(halves[i]);
      break;
    case ort::kDouble:
      for (int64_t i = 0; i < size; ++i) widened[i] = static_cast<float>(static_cast<const double*>(values.data)[i]);
      break;
    default: throw InvalidNode("values of element type " + std::to_string(values.type) + " are not supported");
  }
  return widened.data();
}

}  // namespace nmconvert
